"""How much disk a run's checkpoints need, and whether it is there."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 1_000_000_000
# Moments that an optimizer keeps for each parameter, in fp32; unknown ones are taken for Adam.
_MOMENTS = {"decoupled_lionw": 1, "lion": 1, "decoupled_sgdw": 1, "sgd": 1}
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Clock:
    """What turns one unit of training time into another.

    Attributes:
        samples: of a batch, over all ranks.
        length: tokens of a sample.
    """

    samples: int
    length: int

    def batches(self, value: float, unit: str) -> float | None:
        """A span in batches, or None for epochs, whose length only the data knows."""
        per_batch = {"ba": 1, "sp": self.samples, "tok": self.samples * self.length}.get(unit)
        return None if per_batch is None else value / per_batch


def moments(optimizer: str) -> int:
    """How many numbers an optimizer keeps for each parameter, by its name in llm-foundry."""
    return _MOMENTS.get(optimizer, ADAM_MOMENTS)


def split_time(time: str | int) -> tuple[float, str]:
    """`1000ba` -> (1000, "ba"); a bare number counts epochs, as in Composer."""
    text = str(time).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(digits.replace("_", "")), text[len(digits) :] or "ep"


def count_saves(max_duration: str | int, interval: str | int, clock: Clock) -> int | None:
    """How many checkpoints a run writes in all, or None where that depends on its epochs.

    Args:
        max_duration: of the run.
        interval: between checkpoints; one is always written at the end.
        clock: of the run.
    """
    total, unit = split_time(max_duration)
    step, step_unit = split_time(interval)
    if step_unit == "dur":
        return math.ceil(round(1 / step, 9))
    if step_unit != unit:
        total, step = clock.batches(total, unit), clock.batches(step, step_unit)
    return None if total is None or step is None else math.ceil(round(total / step, 9))


def count_kept(saves: int | None, keep: int) -> int | None:
    """How many checkpoints are on the disk at the same time, at most.

    Args:
        saves: of `count_saves`.
        keep: Composer's `save_num_checkpoints_to_keep`, -1 for all. The oldest one is deleted only
            after the newest is written.
    """
    if keep < 0:
        return saves
    return keep + 1 if saves is None else min(keep + 1, saves)


def checkpoint_bytes(parameters: int, moments: int, *, weights_only: bool = False) -> int:
    """Size of a checkpoint in fp32; the operators' share is below a percent."""
    return parameters * 4 * (1 if weights_only else 1 + moments)


def check_disk(folder: Path, kept: int, size: int, *, existing: int = 0) -> None:
    """Refuse a run whose checkpoints cannot all be saved.

    Args:
        folder: of the checkpoints; it need not exist yet.
        kept: how many there are at most at the same time.
        size: of each.
        existing: bytes of this run's earlier checkpoints, which are among those kept.

    Raises:
        ValueError: with what is needed, what is free, and what to do.
    """
    needed, free = max(0, kept * size - existing), free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"save_folder: {kept} checkpoints of {size / GIGABYTE:.1f} GB need "
            f"{needed / GIGABYTE:.1f} GB in {folder}, free are {free / GIGABYTE:.1f} GB. Save to "
            "another disk, make `save_interval` longer, or keep fewer with "
            "`save_num_checkpoints_to_keep`"
        )


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
