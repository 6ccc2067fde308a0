"""From the results of a campaign (`benchmarks/reproduce/`), a line of JSON each, to runs."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from apex_composer.callbacks.metrics_file import NAME
from apex_composer.report.groups import APEX
from apex_composer.report.read_metrics import flatten
from apex_composer.report.run import Curve, Run

SUFFIX = ".jsonl"
Record = Mapping[str, Any]
# Of an arm's settings: names and questions, which say nothing of how a run was trained; and whether
# the mean of its checkpoints is a result too: that one has `averaged_batches`.
_NOT_SETTINGS = ("name", "base", "study", "apex", "averaged")
_CODE = "this repository"  # among the versions of packages
_LACKS = (
    "training loss of each batch, durations of batches: a campaign keeps the validation losses at "
    "the ends of its stages",
    "stages and their scores: a campaign keeps means over all sites",
)


def split_path(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The file of a campaign, and what comes after it: `<base>/<study>/<arm>/seed<n>` or less.

    Returns:
        None where no part of the path is such a file.
    """
    for own in (path, *path.parents):
        if own.suffix == SUFFIX and own.name != NAME and own.is_file():
            return own, path.parts[len(own.parts) :]
    return None


def read_campaign(path: Path, chosen: Sequence[str] = ()) -> list[Run]:
    """Read the runs of a campaign, or some of them, APEX as it is before what varies it.

    A run's folder is below the file, where there is none: its base, study, arm and seed. With runs
    of several bases, the base comes before the arm in their names.

    Args:
        path: file of results.
        chosen: first parts of the folders that are wanted. Default: all.

    Raises:
        FileNotFoundError: there is none below `chosen`; the message says what there is.
        ValueError: a line is damaged, or of something else; the message names it.
    """
    records = _read_lines(path)
    try:
        placed = _place(sorted(records, key=_variations))
        wanted = {parts: r for parts, r in placed.items() if parts[: len(chosen)] == tuple(chosen)}
        several = len({_origin(record) for record in wanted.values()}) > 1
        runs = [_make_run(path, parts, r, several) for parts, r in wanted.items()]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or holds no results of a campaign: {error!r}. Leave it out, or "
            "remove the line"
        ) from error
    if not runs:
        raise FileNotFoundError(f"{Path(path, *chosen)} is no run. {_known(placed, chosen)}")
    return runs


def _read_lines(path: Path) -> list[Record]:
    """All whole lines; a last one without its end is what a killed campaign has left."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is damaged: {error}. Remove this line") from error
    return records


def _variations(record: Record) -> tuple[bool, int]:
    """Conventional runs first, then those with the fewest settings of their own."""
    own = record["settings"]
    apex = own["apex"]
    return apex is not None, len(apex or {}) + len(own["variation"]) + (not own["keep_optimizer"])


def _origin(record: Record) -> tuple[str, ...]:
    """What runs share that may be compared; the name of a base says which text they read."""
    name, scale = record["settings"]["base"], json.dumps(record["scale"], sort_keys=True)
    return record["texts"], record["base"], name, scale


def _place(records: Sequence[Record]) -> dict[tuple[str, ...], Record]:
    """Every record by its base, study, arm and seed, numbered where that is not enough."""
    origins = {record["settings"]["base"]: set[tuple[str, ...]]() for record in records}
    for record in records:
        origins[record["settings"]["base"]].add(_origin(record))
    placed: dict[tuple[str, ...], Record] = {}
    for record in records:
        base = record["settings"]["base"]
        if len(origins[base]) > 1:
            base = f"{base}-{record['base'][:8]}"
        parts, seed = (base, record["study"], record["arm"]), f"seed{record['seed']}"
        names = chain([seed], (f"{seed}-{number}" for number in count(2)))
        placed[next((*parts, name) for name in names if (*parts, name) not in placed)] = record
    return placed


def _known(placed: Mapping[tuple[str, ...], Record], chosen: Sequence[str]) -> str:
    """What there is below the longest part of `chosen` that is there."""
    for depth in reversed(range(len(chosen))):
        found = dict.fromkeys(p[depth] for p in placed if p[:depth] == tuple(chosen[:depth]))
        if found:
            return f"There: {', '.join(found)}"
    return "It has no whole line"


def _make_run(path: Path, parts: tuple[str, ...], record: Record, several: bool) -> Run:
    name = f"{parts[0]}/{record['arm']}" if several else record["arm"]
    scale, machine = record["scale"], record["machine"]
    batches = [0, *record["stage_ends"]]
    per_batch = scale["batch"] * scale["sizes"]["length"]
    norms = [stage.get("relative_norm") for stage in record["stages"]]
    metrics = {}
    if norms and None not in norms:
        metrics["apex/operator_norm/all sites"] = _curve(batches[1:], per_batch, norms)
    domains = {
        domain: _curve(batches, per_batch, [losses[domain] for losses in record["losses"]])
        for domain in record["losses"][0]
    }
    return Run(
        name=name,
        folder=Path(path, *parts),
        settings=_settings(record, name),
        versions={k: v for k, v in machine["versions"].items() if v is not None}
        | {_CODE: f"commit {machine['commit']}"},
        device=machine["device"],
        data={"text": record["texts"], **record["texts_facts"]},
        loss=Curve([], [], []),
        validation=domains,
        validation_tokens=dict.fromkeys(domains, 1),  # the mean, as everywhere in a campaign
        step_seconds=[],
        metrics=metrics,
        missing=_LACKS,
    )


def _curve(batches: Sequence[int], per_batch: int, values: Sequence[float]) -> Curve:
    if len(batches) != len(values):
        raise ValueError(f"{len(values)} values at {len(batches)} places")
    return Curve(batches, [batch * per_batch for batch in batches], values)


def _settings(record: Record, name: str) -> dict[str, Any]:
    """Flat, with the keys of a YAML where there is one: by them, runs are put together."""
    own = record["settings"]
    settings = {key: value for key, value in own.items() if key not in _NOT_SETTINGS}
    apex = {} if own["apex"] is None else flatten(own["apex"], f"{APEX}.")
    return {
        "run_name": name,
        "seed": record["seed"],
        "load_path": f"{own['base']} {record['base']}",
        "max_duration": f"{record['stage_ends'][-1]}ba",
        "text": record["texts"],
        "averaged_batches": record.get("averaged_batches"),
        "stage_ends": record["stage_ends"],
        **flatten({"scale": record["scale"], **settings}),
        **apex,
    }
