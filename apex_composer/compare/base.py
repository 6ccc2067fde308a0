"""What all runs begin with: the base model of `make train`, and instructions for it."""

import hashlib
from pathlib import Path
from typing import Any

from apex_composer.callbacks.run_facts import versions
from apex_composer.compare.configuration import DEMO_YAML, FOLDER
from apex_composer.compare.instructions import make_instructions
from apex_composer.demo.__main__ import choose_precision, prepare_data, start_run
from apex_composer.demo.configuration import build_configurations, load_template
from apex_composer.demo.documents import PRETRAIN
from apex_composer.demo.from_scratch import TOKENIZER
from apex_composer.demo.model import write_model_folder
from apex_composer.tools.merge import merge

BASE, DATA = "base", "data"
# They say how progress is shown, which depends on the terminal.
SHOWN = ("progress_bar", "log_to_console", "console_log_interval")


def prepare_inputs(
    data: Path | None, out: Path, overrides: list[str], length: int
) -> dict[str, Any]:
    """Write `<out>/compare/base/` and `<out>/compare/data/`, unless they hold the same.

    Args:
        data: folder of RedPajama-format text, or None for what every machine has.
        out: folder of `make train`, whose data and base model are used where they are there.
        overrides: changes to `yamls/demo.yaml`.
        length: tokens of an example at most.

    Returns:
        What the runs read, and with which packages: all that decides their numbers beside their
        settings.

    Raises:
        OSError, ValueError: a setting or the data is unusable.
        RuntimeError: the base model's run failed.
    """
    checkpoint = train_base(data, out, overrides)
    weights = out / FOLDER / BASE / "model.safetensors"
    if not weights.is_file() or weights.stat().st_mtime < checkpoint.stat().st_mtime:
        merge([checkpoint], weights.parent, overwrite=True)  # of one checkpoint its conversion
    instructions = make_instructions(data, out / "data", out / FOLDER / DATA, length)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"base": digest, "instructions": instructions, "versions": versions()}


def train_base(data: Path | None, out: Path, overrides: list[str]) -> Path:
    """Train the base model as `make train` does, unless its checkpoint is there and no older.

    Returns:
        Composer's checkpoint.
    """
    from omegaconf import OmegaConf

    template = load_template(DEMO_YAML, out, overrides)
    prepared = prepare_data(data, out, template)
    parts = prepared.splits, out / "data", choose_precision()
    settings = build_configurations(template, *parts, is_watched=False)[BASE]
    checkpoint, config = out / BASE / "checkpoint.pt", out / BASE / "config.yaml"
    read = out / "data" / PRETRAIN / "manifest.json"
    if checkpoint.is_file() and checkpoint.stat().st_mtime > read.stat().st_mtime:
        before = OmegaConf.to_container(OmegaConf.load(config))
        if _unshown(before) == _unshown(settings):
            return checkpoint
    length = template.shared.max_seq_len
    model = out / "model", out / "data" / TOKENIZER, dict(template.variables.model), length
    write_model_folder(*model)
    start_run(BASE, out, settings)
    return checkpoint


def _unshown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide weights: not those of other runs, nor how progress is shown."""
    return {key: value for key, value in settings.items() if key not in (*SHOWN, "variables")}
