"""Composer's rule for `device_train_microbatch_size: auto`, for forward passes before training."""

from collections.abc import Callable

import torch
from composer.core import State

# Private, but the rule itself: what counts as out of memory, halving, its end, and cleaning up.
from composer.trainer.trainer import _adjust_device_train_microbatch_size, _is_cuda_oom
from composer.utils import dist


def in_fitting_microbatches(
    state: State, attempt: Callable[[], None], forget: Callable[[], None]
) -> None:
    """Run a batch; with `auto`, halve the microbatch and try again where memory runs out.

    All ranks try again if any of them has to. Training then starts at the size that was found:
    with gradients it needs more memory, not less.

    Args:
        state: that of the trainer; its device_train_microbatch_size is what is halved.
        attempt: runs the batch in microbatches of the state's size.
        forget: drops what a failed attempt has left.

    Raises:
        RuntimeError: out of memory without `auto`, or with a single sample.
    """
    while _runs_out_of_memory(state, attempt, forget):
        forget()
        _adjust_device_train_microbatch_size(state)


def _runs_out_of_memory(
    state: State, attempt: Callable[[], None], forget: Callable[[], None]
) -> bool:
    found = False
    try:
        attempt()
    except Exception as error:
        forget()
        found = isinstance(error, RuntimeError) and _is_cuda_oom(error)
        if not (found and state.auto_microbatching):
            raise
    return state.auto_microbatching and _on_any_rank(found, state)


def _on_any_rank(found: bool, state: State) -> bool:
    """Composer's exchange: pairs of reductions that the hooks of its FSDP modules answer.

    A rank that has run out of memory waits here for those that are still within the batch; they
    learn of it before their next gathering of weights, where they would wait for it in vain.
    """
    finished = False
    while not finished:
        found = _reduce(found, "MAX", state)
        finished = _reduce(True, "MIN", state)
    return found


def _reduce(flag: bool, operation: str, state: State) -> bool:
    tensor = state.device.tensor_to_device(torch.tensor([flag], dtype=torch.uint8))
    dist.all_reduce(tensor, reduce_operation=operation)
    return bool(tensor.item())
