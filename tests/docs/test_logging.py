"""docs/logging.md lists what APEX logs, and its loggers are Composer's."""

import inspect
import re
from pathlib import Path

import yaml
from composer.loggers import TensorboardLogger, WandBLogger
from composer_run import run
from helpers import tiny_llama
from llmfoundry.registry import loggers

from apex_composer import APEX

PAGE = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
LISTED = re.findall(r"^\| `(apex/.+?)` \|", PAGE, re.MULTILINE)


def matching(metric: str) -> list[str]:
    """Entries of the page's table that a metric is one of."""
    return [e for e in LISTED if re.fullmatch(re.sub(r"<\w+>", r"[^/]+", e), metric)]


def test_the_list_is_what_apex_logs():
    logged = set()
    for trainable, share in (("all", None), ("selected", 0.3)):
        settings = {"threshold": 0.25, "stages": 2, "log_interval": 1, "trainable": trainable}
        apex = APEX(**settings, trainable_share=share)
        _, _, log = run(apex, model=tiny_llama(kv_heads=4), max_duration="4ba")
        logged |= {name for name in log.data if name.startswith("apex/")}
        if trainable == "selected":
            assert "apex/trained" in log.hyperparameters
    assert {metric: len(matching(metric)) for metric in logged} == dict.fromkeys(logged, 1)
    assert {entry for metric in logged for entry in matching(metric)} == set(LISTED)


def test_the_loggers_of_the_page_are_known_with_their_settings():
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    classes = {"tensorboard": TensorboardLogger, "wandb": WandBLogger}
    given = yaml.safe_load(block)["loggers"]
    assert set(given) == set(classes)
    for name, settings in given.items():
        assert loggers.get(name) is classes[name]
        inspect.signature(classes[name]).bind(**settings)
