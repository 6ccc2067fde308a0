"""torch.distributed where it runs, and the same calls for a single process where it does not."""

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
