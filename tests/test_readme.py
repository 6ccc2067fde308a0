"""What README and the pages tell users to write is run: the loop, the YAML blocks, the commands."""

import inspect
import re
import shlex

import pytest
import torch
from helpers import tiny_llama, tokens
from llmfoundry.utils import builders
from omegaconf import OmegaConf
from pages import PAGES, ROOT, blocks, commands
from typer.main import get_command

from apex_composer import APEX
from apex_composer.cli import app
from apex_composer.trainer.config_transform import normalise_algorithms

README = PAGES["README.md"]
COMMANDS = get_command(app).commands
SECTIONS = ("algorithms", "callbacks", "scheduler")


def test_the_readme_is_short():
    assert len(README.splitlines()) < 250


def test_the_loop_trains_and_leaves_an_ordinary_model():
    (block,) = blocks(README, "python")
    model = tiny_llama(kv_heads=8, heads=8)
    names = list(model.state_dict())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = [{"input_ids": tokens(4, seed=n), "labels": tokens(4, seed=n)} for n in range(3)]
    given = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "input_ids": tokens(8),
        "loader": batches,
    }
    exec(compile(block, "README.md", "exec"), given)
    expander = given["expander"]
    assert expander.stage == 0 and len(expander.history) == 1 and expander.selections
    assert list(model.state_dict()) == names
    moved = [n for n, weight in model.state_dict().items() if not torch.equal(weight, before[n])]
    assert moved == names
    assert torch.isfinite(model(**batches[0]).loss)


def written(text: str) -> list[dict]:
    """The YAML of a page that builds something: in blocks, and in single lines of code."""
    inline = re.findall(rf"`((?:{'|'.join(SECTIONS)}): [\[{{][^`]*[\]}}])`", text)
    inline = [line for line in inline if "..." not in line]
    found = [OmegaConf.create(block) for block in (*blocks(text, "yaml"), *inline)]
    plain = [OmegaConf.to_container(config, resolve=False) for config in found]
    return [config for config in plain if config.keys() & set(SECTIONS)]


def build(config: dict) -> list[object]:
    """Algorithms, scheduler and callbacks as llm-foundry makes them of a configuration."""
    config = normalise_algorithms(config)
    made = [builders.build_algorithm(n, dict(s)) for n, s in config.get("algorithms", {}).items()]
    if "scheduler" in config:
        settings = dict(config["scheduler"])
        made.append(builders.build_scheduler(settings.pop("name"), settings))
    for name, settings in config.get("callbacks", {}).items():
        made.append(builders.build_callback(name, dict(settings or {}), train_config={}))
        if name == "heartbeat":
            made[-1].close(None, None)  # it has started its thread
    return made


@pytest.mark.parametrize("page", [page for page in PAGES if written(PAGES[page])])
def test_the_yaml_of_a_page_builds_what_it_names(page):
    for config in written(PAGES[page]):
        assert build(config), config


def test_the_block_of_the_readme_has_every_setting_of_apex():
    block = next(c for c in written(README) if isinstance(c["algorithms"], dict))
    settings = set(inspect.signature(APEX).parameters) - {"branch", "unknown"}
    assert set(block["algorithms"]["apex"]) == settings
    apex = build(block)[0]
    assert isinstance(apex, APEX) and repr(apex) == repr(APEX())


def wrong_words(line: str) -> list[str]:
    """What a command line names and is not there: a command, an option, a file, a target."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["apex-composer"]:
        if words[1] not in COMMANDS:
            return [words[1]] * (not words[1].startswith("-"))
        known = {option for p in COMMANDS[words[1]].params for option in p.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        required = {p.opts[0] for p in COMMANDS[words[1]].params if p.required}
        options = {name for name in required if name.startswith("--")}
        return sorted(given - known - {"--help"}) + sorted(options - given)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [w for w in words[1:] if "=" not in w and w not in targets]
    files = [w for w in words if re.match(r"(yamls|benchmarks)/", w)]
    return [name for name in files if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(PAGES[page])])
def test_the_commands_of_a_page_exist_with_their_options(page):
    lines = [line for line in commands(PAGES[page]) if line.startswith(("apex-", "make ", "comp"))]
    wrong = {line: wrong_words(line) for line in lines}
    assert {line: words for line, words in wrong.items() if words} == {}


def test_a_wrong_command_is_noticed():
    assert wrong_words("apex-composer plam run.yaml") == ["plam"]
    assert wrong_words("apex-composer plan run.yaml --gpu h100 --cpus 3") == ["--cpus"]
    assert wrong_words("apex-composer merge a.pt") == ["--out"]
    assert wrong_words("make trian  # all") == ["trian"]
    assert wrong_words("composer train.py yamls/none.yaml a=b") == ["yamls/none.yaml"]
