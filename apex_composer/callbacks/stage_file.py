"""The file of a stage that `local_metrics` writes: its record and the scores behind it."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apex_composer.data_prep.atomic_files import write_bytes


def write_stage(
    path: Path, record: dict[str, Any], expander: Any, ranked: Mapping[str, torch.Tensor]
) -> None:
    """One stage's record as JSON, with the groups' units in order, and its scores by group.

    A file that has this record already is left alone where the scores are not known any more.

    Args:
        record: see `assessment.stage_record`.
        expander: its run's.
        ranked: the scores that this stage was selected by; empty where they are not known.
    """
    units = {group.name: group.unit for group in expander.groups}
    content = json.dumps({**record, "units": units, "method": expander.method})
    if not ranked and _record_in(path) == content:
        return
    scores = {f"scores/{name}": values.cpu().numpy() for name, values in ranked.items()}
    whole = io.BytesIO()  # zipfile's own end is no clean one where a write fails
    np.savez_compressed(whole, record=np.array(content), **scores)
    write_bytes(path, whole.getvalue())


def _record_in(path: Path) -> str | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return str(content["record"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # not there, or not whole: it is written anew
