"""A run from the files of the logger `local_metrics`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.callbacks.metrics_file import (
    BATCH,
    EVALUATION,
    LOSS,
    LOST,
    SETTINGS,
    STAGE,
    START,
    Line,
    read_lines,
    read_number,
)
from apex_composer.report.run import Curve, Run, Stage

EVALUATED = "metrics/eval"
CROSS_ENTROPY = "/LanguageCrossEntropy"
# Facts among the hyperparameters that no YAML has.
FACTS = ("composer_version", "composer_commit_hash", "num_nodes", "node_name", "rank_zero_seed")


def read_metrics(path: Path, folder: Path) -> Run:
    """Read a run from its `metrics.jsonl`.

    Args:
        folder: the run's, for its name and its observations.

    Raises:
        ValueError: the file has no start of a run, so it is not of this logger.
    """
    lines, damaged = read_lines(path)
    start = next((line for line in reversed(lines) if line["kind"] == START), None)
    if start is None:
        raise ValueError(f"{path} is no file of the logger local_metrics: no line says `start`")
    missing = [f"{damaged} lines of {path.name} are damaged and left out"] if damaged else []
    missing += [_describe_lost(line) for line in lines if line["kind"] == LOST]
    settings = _settings(lines)
    stages, of_stages = read_stages(lines, path.parent)
    batches = [line for line in lines if line["kind"] == BATCH]
    curves = _curves(lines)
    names = [name for name in curves if name.startswith(EVALUATED) and name.endswith(CROSS_ENTROPY)]
    validation = {
        _domain(name.removeprefix("metrics/").removesuffix(CROSS_ENTROPY)): curves.pop(name)
        for name in names
    }
    predicted = {
        _domain(label): count
        for line in lines
        if line["kind"] == EVALUATION
        for label, count in line.get("predicted", {}).items()
    }
    missing += of_stages + _missing(settings, validation, predicted, batches)
    return Run(
        name=start["run_name"],
        folder=folder,
        settings=settings,
        versions=start["versions"],
        device=start["device"],
        data={},
        loss=curves.pop(LOSS, Curve((), (), ())),
        validation=validation,
        validation_tokens=predicted,
        step_seconds=[line["took"] for line in batches],
        metrics=curves,
        stages=stages,
        missing=missing,
    )


def _domain(label: str) -> str:
    """`eval/cc` is the domain cc; a loader without a label is `eval`."""
    return label.removeprefix("eval/")


def _missing(
    settings: Mapping[str, Any],
    validation: Mapping[str, Curve],
    predicted: Mapping[str, int],
    batches: Sequence[Line],
) -> list[str]:
    found = []
    if not settings:
        found.append("settings: the run did not log them (log_config: true in the YAML)")
    if not validation:
        found.append("validation: nothing was evaluated (eval_loader and eval_interval)")
    elif any(len(curve.values) < 2 for curve in validation.values()):
        found.append("validation curve: there is one evaluation (lower eval_interval)")
    if len(validation) > 1 and validation.keys() - predicted.keys():
        found.append("validation tokens: without them there is no total")
    if batches and not any(line["trained"] for line in batches):
        found.append("training tokens: the data loader does not count them")
    return found


def _describe_lost(line: Line) -> str:
    return (
        f"{line['lines']} batches from {line['first']} to {line['batch']}: the disk was full or "
        "could not be written to"
    )


def _settings(lines: Sequence[Line]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for line in lines:
        if line["kind"] == SETTINGS:
            flat |= flatten(line["settings"])
    facts = (*FACTS, "num_gpus_per_node", "num_cpus_per_node")
    own = {k: v for k, v in flat.items() if k not in facts and "enabled_algorithms/" not in k}
    return own if any(key.startswith("model.") for key in own) else {}


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """`{a: {b: 1}, c: [{label: x, d: 2}]}` as `{a.b: 1, c.x.d: 2}`; lists of plain values stay."""
    if isinstance(settings, Mapping) and settings:
        items = settings.items()
    elif isinstance(settings, list) and settings and all(isinstance(v, Mapping) for v in settings):
        items = [(value.get("label", place), value) for place, value in enumerate(settings)]
    else:
        return {prefix.removesuffix("."): settings}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def _curves(lines: Sequence[Line]) -> dict[str, Curve]:
    """Every number by its name; of two values at one batch the later one counts."""
    found: dict[str, dict[int, tuple[int, float]]] = {}
    for line in lines:
        if line["kind"] not in (BATCH, EVALUATION):
            continue
        batch, tokens = line["batch"], line["tokens"]
        _add(found, line["metrics"], batch, tokens)
        if "during" in line:
            _add(found, line["during"], batch - 1, tokens - line["trained"])
    curves = {}
    for name, values in found.items():
        batches = sorted(values)
        tokens, numbers = zip(*(values[batch] for batch in batches), strict=True)
        curves[name] = Curve(batches, list(tokens), list(numbers))
    return curves


def _add(found: dict, metrics: Mapping[str, Any], batch: int, tokens: int) -> None:
    for name, value in metrics.items():
        own = read_number(value)
        if own is not None:
            found.setdefault(name, {})[batch] = (tokens, own)


def read_stages(lines: Sequence[Line], folder: Path) -> tuple[list[Stage], list[str]]:
    """The stages in order, and what of them is missing."""
    files = {line["stage"]: line["file"] for line in lines if line["kind"] == STAGE}
    stages, missing = [], []
    for number, name in sorted(files.items()):
        try:
            with np.load(folder / name, allow_pickle=False) as content:
                record = json.loads(str(content["record"]))
                scores = {
                    key.removeprefix("scores/"): content[key].tolist()
                    for key in content.files
                    if key.startswith("scores/")
                }
        except (OSError, ValueError, KeyError) as error:
            missing.append(f"stage {number}: {folder / name} cannot be read ({error})")
            continue
        stages.append(make_stage(record, scores or None))
        if not scores and record["method"] != "random":
            missing.append(f"scores of stage {number}: it began before they were kept")
    return stages, missing


def make_stage(record: Mapping[str, Any], scores: Mapping[str, Any] | None) -> Stage:
    """A stage from its record, see `assessment.stage_record`."""
    groups = record["advantageous"]
    return Stage(
        number=record["stage"],
        batch=record.get("start_batch", 0),
        expansion=record["expansion"],
        units={name: record.get("units", {}).get(name) or _unit(name) for name in groups},
        advantageous=groups,
        disadvantageous=record["disadvantageous"],
        overlap=record["overlap"],
        norm_std=record["norm_std"],
        scores=scores,
    )


def _unit(group: str) -> str:
    """Old records have no units, but `model.layers.0.self_attn.kv_heads` ends with them."""
    return group.rsplit(".", 1)[-1].removesuffix("s")
