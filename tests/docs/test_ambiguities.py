"""docs/ambiguities.md: what gives the other reading exists and is accepted; its law is computed."""

import inspect
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmfoundry.utils import builders
from pages import PAGES, ROOT

from apex_composer import APEX
from apex_composer.settings import ASSESSMENT_SETTINGS
from apex_composer.tools.training_yaml import build_algorithm, lay_out_stages, load_configuration

PAGE = PAGES["docs/ambiguities.md"]
OPTIONS = set(re.findall(r"^\| `(--[\w-]+)` \|", PAGES["docs/settings.md"], re.MULTILINE))
INSTRUCT, PRETRAINING = "instruct/llama2_7b_apex.yaml", "tinyllama_apex.yaml"
APEX_SETTINGS = set(inspect.signature(APEX).parameters) - {"unknown"}


def rows(page: str) -> Iterator[tuple[str, Path]]:
    """The last cell of every row of a table, and the YAML that its settings are for."""
    for section in page.split("\n## ")[1:]:
        usual = INSTRUCT if section.startswith("Instruction") else PRETRAINING
        for row in re.findall(r"^\| (?!question|---).*", section, re.MULTILINE):
            last = row.rstrip("| ").rpartition(" | ")[2]
            linked = re.findall(r"\]\(\.\./yamls/([\w/.-]+)\)", last)
            yield last, ROOT / "yamls" / [usual, *linked][-1]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def is_known(setting: str, config: dict) -> bool:
    """Whether a dotted setting is one of APEX, or stands in a YAML."""
    path = setting.split(".")
    if path[:2] == ["algorithms", "apex"]:
        nested = path[3:]
        allowed = ASSESSMENT_SETTINGS if path[2] == "assessment" else ()
        return path[2] in APEX_SETTINGS and len(nested) <= 1 and set(nested) <= set(allowed)
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def wrong_settings(cell: str, yaml: Path) -> list[str]:
    """Options and settings that a cell names and that are not there."""
    words = [word for span in spans(cell) for word in shlex.split(span)]
    names = [word.partition("=")[0] for word in words]
    settings = [n for w, n in zip(words, names, strict=True) if "=" in w or "." in n]
    config = load_configuration(yaml)
    wrong = [name for name in names if name.startswith("--") and name not in OPTIONS]
    return wrong + [name for name in settings if not is_known(name, config)]


CELLS = [(cell, yaml) for cell, yaml in rows(PAGE) if spans(cell)]
NAMING = [(cell.replace("`apex-composer plan`", ""), yaml) for cell, yaml in CELLS]
GIVEN = [(span, yaml) for cell, yaml in CELLS for span in spans(cell) if "=" in span]


def test_the_page_is_short_and_its_tables_are_read():
    assert len(PAGE.splitlines()) < 150
    assert len(list(rows(PAGE))) > 35 and len(NAMING) > 20 and len(GIVEN) > 12


def test_every_setting_and_option_exists():
    wrong = {cell: wrong_settings(cell, yaml) for cell, yaml in NAMING}
    assert {cell: names for cell, names in wrong.items() if names} == {}


@pytest.mark.parametrize(("given", "yaml"), GIVEN, ids=[given for given, _ in GIVEN])
def test_a_setting_makes_another_run_that_can_be_built(given, yaml):
    config = load_configuration(yaml, shlex.split(given))
    assert config != load_configuration(yaml)
    apex = build_algorithm(config["algorithms"])
    lay_out_stages(apex.stages, config["max_duration"])
    scheduler = dict(config["scheduler"])
    assert builders.build_scheduler(scheduler.pop("name"), scheduler)


def test_a_setting_that_is_not_there_is_noticed():
    yaml = ROOT / "yamls" / PRETRAINING
    cell = "`algorithms.apex.kv_head=skip` `--val-for-each` `optimizer.beta` `seed=18`"
    assert wrong_settings(cell, yaml) == [
        "--val-for-each",
        "algorithms.apex.kv_head",
        "optimizer.beta",
    ]
    assert wrong_settings("`algorithms.apex.assessment.token`", yaml)


def law(rates: list[float], past: float) -> list[float]:
    """Loss after each span of 10,000 steps: MultiPowerLaw's README, its 400M parameters.

    L = L_0 + A S_1^-alpha - B sum_k (eta_{k-1} - eta_k) G(eta_k^-gamma S_k),
    G(x) = 1 - (C x + 1)^-beta. S_k are the learning rates since step k added up, S_1 with the past.
    """
    least, a, alpha, b, c, beta, gamma = 2.375, 0.654, 0.429, 523.425, 2.025, 0.594, 0.635
    losses = []
    for end in range(1, len(rates) + 1):
        sums = [10_000 * sum(rates[k:end]) for k in range(end)]
        drop = sum(
            (rates[k - 1] - rates[k]) * (1 - (c * rates[k] ** -gamma * sums[k] + 1) ** -beta)
            for k in range(1, end)
        )
        losses.append(least + a * (past + sums[0]) ** -alpha - b * drop)
    return losses


def test_what_decay_alone_is_worth():
    past = 1_430_512 * (4e-4 + 4e-5) / 2  # TinyLLaMA's cosine from 4e-4 to 4e-5, its mean rate
    constant, decayed = law([1e-4] * 3, past), law([1e-4, 4e-5, 1e-5], past)
    gaps = [f"{one - other:.3f}" for one, other in zip(constant, decayed, strict=True)]
    table = [f"{math.log(a / b):.3f}" for a, b in ((5.87, 5.75), (5.85, 5.55), (5.83, 5.44))]
    text = " ".join(PAGE.split())
    assert "apart by {}, {} and {} nats".format(*table) in text
    assert gaps[0] == "0.000" and f"says 0, {gaps[1]} and {gaps[2]} without" in text
    assert f"add up to {past:.0f})" in text
    assert law([1e-4] * 3, 0)[2] < law([1e-4, 4e-5, 1e-5], 0)[2]  # "the sign is the other one"
