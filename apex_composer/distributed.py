"""torch.distributed where it runs, and the same calls for a single process where it does not."""

import hashlib
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 without torch.distributed."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def global_rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch.distributed.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def check_same_on_all_ranks(what: str, value: Any) -> None:
    """Compare a hash of plain data on all ranks (collective).

    Args:
        what: name of the data, for the error.
        value: numbers, strings, lists and dicts of them.

    Raises:
        RuntimeError: on every rank, where one rank's value differs from rank 0's.
    """
    if world_size() == 1:
        return
    own = hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
    hashes: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(hashes, own)
    others = [rank for rank, other in enumerate(hashes) if other != hashes[0]]
    if others:
        raise RuntimeError(
            f"{what} differs between the ranks: rank 0 has {hashes[0]}, ranks {others} have "
            f"{[hashes[rank] for rank in others]}. Training on would make the ranks' models drift "
            "apart. Give all ranks the same weights, settings and seed, and let every rank run "
            "the same number of forward passes before a stage begins"
        )
