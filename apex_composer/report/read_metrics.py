"""A run from the files of the logger `local_metrics`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from apex_composer.callbacks.metrics_file import (
    BATCH,
    EVALUATION,
    LOSS,
    LOST,
    SETTINGS,
    START,
    Line,
    read_lines,
    read_number,
)
from apex_composer.report.groups import NOT_SET, ORIGIN, is_hidden
from apex_composer.report.read_stages import read_stages
from apex_composer.report.run import Curve, Run

LOGGED, OF_TRAINING = "metrics/", "metrics/train/"
CROSS_ENTROPY = "/LanguageCrossEntropy"
# Facts among the hyperparameters that no YAML has.
FACTS = ("composer_version", "composer_commit_hash", "num_nodes", "node_name", "rank_zero_seed")


def read_metrics(path: Path, folder: Path) -> Run:
    """Read a run from its `metrics.jsonl`.

    Args:
        folder: the run's, for its name and its observations.

    Raises:
        ValueError: the file has no start of a run, so it is not of this logger; or two runs have
            written to it at the same time.
    """
    lines, damaged = read_lines(path)
    starts = [line for line in lines if line["kind"] == START]
    if not starts:
        raise ValueError(f"{path} is no file of the logger local_metrics: no line says `start`")
    _check_order(lines, path)
    last = starts[-1]
    settings, changes = _settings(lines)
    stages, of_stages = read_stages(lines, path.parent)
    batches = [line for line in lines if line["kind"] == BATCH]
    curves = _curves(lines)
    names = [n for n in curves if n.startswith(LOGGED) and n.endswith(CROSS_ENTROPY)]
    validation = {
        _domain(name.removeprefix(LOGGED).removesuffix(CROSS_ENTROPY)): curves.pop(name)
        for name in names
        if not name.startswith(OF_TRAINING)
    }
    predicted, other_text = _predicted(lines)
    damage = [f"{damaged} lines of {path.name} are damaged and left out"] if damaged else []
    missing = [*damage, *_gaps(lines), *changes, *other_text, *of_stages]
    missing += _missing(settings, validation, predicted, batches)
    return Run(
        name=last["run_name"],
        folder=folder,
        settings=settings,
        versions=_versions([start["versions"] for start in starts]),
        device=_in_turn(start["device"] for start in starts),
        data={},
        loss=curves.pop(LOSS, Curve((), (), ())),
        validation=validation,
        validation_tokens=predicted,
        # A clock that was set back in the meantime has measured nothing.
        step_seconds=[line["took"] for line in batches if line["took"] > 0],
        metrics=curves,
        stages=stages,
        missing=missing,
    )


def _versions(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of every package, in the order of the processes."""
    names = dict.fromkeys(name for versions in found for name in versions)
    return {name: _in_turn(own.get(name, "unknown") for own in found) for name in names}


def _in_turn(values: Iterable[str]) -> str:
    return ", then ".join(dict.fromkeys(values))


def _domain(label: str) -> str:
    """`eval/cc` is the domain cc; a loader without a label is `eval`."""
    return label.removeprefix("eval/")


def _predicted(lines: Sequence[Line]) -> tuple[dict[str, int], list[str]]:
    """The last number of predicted tokens of each domain, and where there was another before."""
    found: dict[str, dict[int, int]] = {}
    for line in lines:
        if line["kind"] == EVALUATION:
            for label, count in line.get("predicted", {}).items():
                own = found.setdefault(_domain(label), {})
                own.pop(count, None)  # the last one stands last
                own[count] = line["batch"]
    return {domain: list(own)[-1] for domain, own in found.items()}, [
        f"one validation text: {domain} had {count:,} predicted tokens until batch {batch}"
        for domain, own in found.items()
        for count, batch in list(own.items())[:-1]
    ]


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


def _gaps(lines: Sequence[Line]) -> list[str]:
    begin = lines[0]["batch"]
    before = (
        f"batches before {begin}: the run went on from a checkpoint, their numbers are elsewhere"
    )
    return [before] * (begin > 0) + [
        f"{line['lines']} batches from {line['first']} to {line['batch']}: the disk was full or "
        "could not be written to"
        for line in lines
        if line["kind"] == LOST
    ]


def _check_order(lines: Sequence[Line], path: Path) -> None:
    before = 0
    for line in lines:
        if line["kind"] == BATCH and line["batch"] <= before:
            raise ValueError(
                f"{path}: batch {line['batch']} follows batch {before}, so two runs have "
                "written to it at the same time, and which number is whose cannot be told. Give "
                "every run a run_name or a `folder` of its own, and leave this one out."
            )
        if line["kind"] in (BATCH, START):
            before = line["batch"]


def _settings(lines: Sequence[Line]) -> tuple[dict[str, Any], list[str]]:
    """Those of the last process that has logged them, and what an earlier one had instead.

    Where a run began is what its first process says: the others went on from its checkpoints.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for line in lines:
        if line["kind"] == START:
            found.append((line["batch"], {}))
        elif line["kind"] == SETTINGS:
            found[-1][1].update(_own(flatten(line["settings"])))
    whole = [(batch, s) for batch, s in found if any(key.startswith("model.") for key in s)]
    if not whole:
        return {}, []
    changes = [
        f"settings until batch {batch}: {key} was {before.get(key, NOT_SET)}"
        for (_, before), (batch, after) in pairwise(whole)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ORIGIN and not is_hidden(key)
    ]
    first, last = whole[0][1], whole[-1][1]
    origin = {key: first[key] for key in ORIGIN if key in first}
    return {key: value for key, value in last.items() if key not in ORIGIN} | origin, changes


def _own(flat: Mapping[str, Any]) -> dict[str, Any]:
    facts = (*FACTS, "num_gpus_per_node", "num_cpus_per_node")
    # What algorithms add, `enabled_algorithms/APEX` or `apex/trained`, follows from the settings.
    return {k: v for k, v in flat.items() if k not in facts and "/" not in k.split(".", 1)[0]}


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
