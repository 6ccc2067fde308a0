"""The file of an observation, `observe.json`: what it is of, and its parts as they are finished."""

import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json, write_json, write_text

RESULTS = "observe.json"
# What an observation is of; a part that was measured of something else is never taken over.
IDENTITY = ("model_sha256", "versions", "settings", "data")
# Between two saves of a part that comes piece by piece.
_SECONDS = 20.0


def open_results(folder: Path, identity: dict[str, Any], *, overwrite: bool = False) -> dict:
    """What an earlier run has finished of the same observation, or a new one.

    Args:
        folder: with `observe.json`, if any.
        identity: `model`, and the keys of IDENTITY; `data` is None where no part needs any, and
            then that of the earlier run stays.
        overwrite: whether to begin anew where the file is of something else.

    Raises:
        ValueError: the file is of something else, and what differs.
    """
    found = read_json(folder / RESULTS)
    if found is None:
        return dict(identity)
    differences = [
        difference
        for key in IDENTITY
        if not (key == "data" and None in (found.get(key), identity[key]))
        for difference in _differences(key, found.get(key), identity[key])
    ]
    if not differences:
        return {**found, "data": identity["data"] or found["data"]}
    if overwrite:
        return dict(identity)
    raise ValueError(
        f"{folder / RESULTS} is of something else: {'; '.join(differences)}. Give another --out, "
        "the same settings, or --overwrite to begin anew"
    )


def _differences(name: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from _differences(f"{name}.{key}", there.get(key), here.get(key))
    elif there != here:
        yield f"{name} is {there!r} there, {here!r} here"


def save_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `observe.json`, whole or not at all."""
    write_json(folder / RESULTS, results)


def keep_pieces(
    folder: Path, results: dict, into: dict[str, Any], pieces: Iterator[tuple[str, Any]]
) -> None:
    """Take a part's pieces into the results, and save these now and then and at the end.

    Args:
        folder: of the results.
        results: the whole.
        into: the place in it that the pieces go to.
        pieces: name and content of each.
    """
    saved = time.monotonic()
    try:
        for name, piece in pieces:
            into[name] = piece
            if time.monotonic() - saved > _SECONDS:
                save_results(folder, results)
                saved = time.monotonic()
    finally:  # also when it is interrupted
        save_results(folder, results)


def write_tables(folder: Path, results: dict[str, Any]) -> None:
    """Write `activations.csv`, `deviations.csv`, `masking.csv`, `ranks.csv`, `delta.csv`.

    Only those of the parts that there are. Lists of `ranks` and `delta` stay in `observe.json`.
    """
    groups = results.get("activations", {}).get("groups", {})
    units = [
        (name, one["unit"], one["layer"], unit, norm, score)
        for name, one in groups.items()
        for unit, (norm, score) in enumerate(zip(one["mean_norm"], one["score"], strict=True))
    ]
    head = ("group", "unit", "layer", "number", "mean_norm", "score")
    _write_csv(folder / "activations.csv", head, units)
    write_deviations(folder / "deviations.csv", {results["model"]: results})
    _write_records(folder / "masking.csv", results.get("masking", []))
    for part in ("ranks", "delta"):
        weights = results.get(part, {}).get("weights", {})
        rows = [{"weight": name, **one} for name, one in weights.items()]
        _write_records(folder / f"{part}.csv", rows)


def write_side_by_side(folder: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Write `side_by_side.csv` (deviations) and `ranks_side_by_side.csv` of several models."""
    if len(found) < 2:
        return
    write_deviations(folder / "side_by_side.csv", found)
    parts = {name: one.get("ranks", {}).get("weights", {}) for name, one in found.items()}
    known = {name: entry for weights in parts.values() for name, entry in weights.items()}
    kinds = ("entropy_rank", "numerical_rank")
    rows = [
        [name, entry["layer"], entry["projection"]]
        + [weights.get(name, {}).get(kind) for kind in kinds for weights in parts.values()]
        for name, entry in known.items()
    ]
    columns = [f"{kind} {name}" for kind in kinds for name in parts]
    _write_csv(folder / "ranks_side_by_side.csv", ("weight", "layer", "projection", *columns), rows)


def write_deviations(path: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Standard deviations of the mean norms by group, a column for each model.

    Args:
        path: CSV to write.
        found: contents of `observe.json` by the model's name.
    """
    parts = {name: one.get("activations", {}).get("groups", {}) for name, one in found.items()}
    known = {name: group for groups in parts.values() for name, group in groups.items()}
    rows = [
        [name, one["unit"], one["layer"]]
        + [groups.get(name, {}).get("std") for groups in parts.values()]
        for name, one in known.items()
    ]
    _write_csv(path, ("group", "unit", "layer", *parts), rows)


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    keys = [
        key
        for key in dict.fromkeys(key for record in records for key in record)
        if not any(isinstance(record.get(key), list | dict) for record in records)
    ]
    _write_csv(path, keys, [[record.get(key) for key in keys] for record in records])


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if not rows:
        return
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
