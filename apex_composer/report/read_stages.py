"""Stages of APEX from the files of the logger `local_metrics`, and from what older jobs kept."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from apex_composer.callbacks.metrics_file import STAGE, Line
from apex_composer.report.run import Stage

# What numpy answers a file with that is none of its own, or not whole (or seems encrypted).
DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error, RuntimeError)


def read_stages(lines: Sequence[Line], folder: Path) -> tuple[list[Stage], list[str]]:
    """The stages in order, and what of them is missing."""
    files = {line["stage"]: line["file"] for line in lines if line["kind"] == STAGE}
    stages, missing = [], []
    for number, name in sorted(files.items()):
        try:
            # Numpy leaves a file open that it has found to be damaged.
            with (
                (folder / name).open("rb") as file,
                np.load(file, allow_pickle=False) as content,
            ):
                record = json.loads(str(content["record"]))
                scores = {
                    key.removeprefix("scores/"): content[key].tolist()
                    for key in content.files
                    if key.startswith("scores/")
                }
        except DAMAGED as error:
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
