"""Whether a YAML is that of the run whose checkpoint it is given with: what was on that run's
command line is not in it."""

import math
from pathlib import Path
from typing import Any

from apex_composer.tools.checkpoint_file import CheckpointFile

_REMEDY = (
    "Give the parent run's own settings: what its command line had (key=value) has to stand in the "
    "YAML, and what changes with --set"
)


def check_rate(parent: CheckpointFile, rate: Any, yaml: Path) -> None:
    """Refuse another learning rate than the checkpoint's: a branch would train with it in silence.

    Args:
        parent: the checkpoint; one without an optimizer's state passes.
        rate: `optimizer.lr` of the YAML; None passes.
        yaml: its file.

    Raises:
        ValueError: naming both.
    """
    bases = sorted({base for _, base in parent.rates})
    if not isinstance(rate, int | float) or not bases:
        return
    if not any(math.isclose(rate, base, rel_tol=1e-9) for base in bases):
        known = ", ".join(f"{base:g}" for base in bases)
        raise ValueError(
            f"optimizer.lr: {yaml} says {rate:g}, but {parent.path} was trained with {known}. "
            f"{_REMEDY}"
        )


def check_batches(parent: CheckpointFile, size: Any, yaml: Path) -> None:
    """Refuse a batch size with which the run could not have come where its clock stands.

    Only the last batch of an epoch may be smaller than the others.

    Args:
        parent: the checkpoint.
        size: `global_train_batch_size` of the YAML; None passes.
        yaml: its file.

    Raises:
        ValueError: naming both.
    """
    batches, samples = parent.clock["batch"], parent.clock["sample"]
    if not isinstance(size, int) or not batches:
        return
    least = (batches - parent.clock["epoch"]) * size
    if not least <= samples <= batches * size:
        raise ValueError(
            f"global_train_batch_size: {yaml} says {size}, but {parent.path} has trained {samples} "
            f"samples in {batches} batches. {_REMEDY}; where the run itself has changed it, decide "
            "by --set global_train_batch_size=..."
        )
