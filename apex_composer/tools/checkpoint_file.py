"""What a Composer checkpoint tells of its run, and what APEX has left there, without a trainer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_composer.data_prep.progress import progress_bar
from apex_composer.trainer.stage_plan import StagePlan

_BLOCK = 1 << 24


@dataclass(frozen=True)
class CheckpointFile:
    """The part of a checkpoint that tells what run it belongs to.

    Attributes:
        path: place of the file.
        apex: state of the algorithm; empty in a run without it.
        clock: progress of the run: `batch`, `token`, `sample`, `epoch`.
        epoch_batches: batches of an epoch; None before one is over.
        rates: learning rate of the next batch and base rate, of every param group of the optimizer.
    """

    path: Path
    apex: dict[str, Any]
    clock: dict[str, int]
    epoch_batches: int | None
    rates: list[tuple[float, float]]

    @property
    def plan(self) -> StagePlan:
        """Where the run's stages end."""
        return StagePlan.from_state(self.apex["stages"])

    @property
    def ended(self) -> int:
        """How many stages are over."""
        return sum(self.now(self.plan.unit) >= end for end in self.plan.ends)

    def now(self, unit: str) -> int:
        """Where the run stands, in `ba`, `tok` or `sp`."""
        return self.clock[{"ba": "batch", "tok": "token", "sp": "sample"}[unit]]


def read_checkpoint(path: Path | str, *, plain: bool = False) -> CheckpointFile:
    """Read a monolithic checkpoint; weights stay on disk.

    The file is unpickled, as Composer itself does it: read only checkpoints that you trust.

    Args:
        path: place of the file, links included.
        plain: whether it may be that of a run without APEX. Default: no.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint that can be read whole, or of a run without APEX.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder (a sharded checkpoint), needed: one file. Save with "
            "`fsdp_config: {state_dict_type: full}`, or export it to one file first"
        )
    state = load_state(path)
    apex = dict(state.get("algorithms", [])).get("APEX", {}).get("apex")
    if apex is None and not (plain and "optimizers" in state):
        found = "weights only (" if plain else "no state of apex (a run without it, or "
        raise ValueError(
            f"{path} holds {found}save_weights_only: true). Its weights can start a new run: "
            "load_path with load_weights_only: true"
        )
    clock = state["timestamp"]["Timestamp"]
    units = ("epoch", "batch", "sample", "token")
    epochs, batches = clock["epoch"], clock["batch"] - clock["batch_in_epoch"]
    return CheckpointFile(
        path,
        apex or {},
        {name: int(clock[name]) for name in units},
        batches // epochs if epochs and batches % epochs == 0 else None,
        _rates(state),
    )


def _rates(state: dict[str, Any]) -> list[tuple[float, float]]:
    optimizers = state.get("optimizers", {}).values()  # save_ignore_keys may leave them out
    groups = [group for optimizer in optimizers for group in optimizer["param_groups"]]
    return [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]


def load_state(path: Path) -> dict[str, Any]:
    """What a monolithic checkpoint has under `state`; tensors stay on disk until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read whole.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Needed: a local checkpoint file (.pt)")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["state"]
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a Composer checkpoint ({type(error).__name__}: {error}). "
            "A save that was killed leaves such files"
        ) from error


def hash_file(path: Path) -> str:
    """The sha256 of a file that may be larger than the memory, with a bar where it takes long."""
    digest, size = hashlib.sha256(), path.stat().st_size
    bar = progress_bar(desc="sha256", total=size, unit="B", unit_scale=True, delay=2)
    with path.open("rb") as file, bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
