"""Which implementation runs: plain torch, or the Triton kernels. The only file that imports them.

`auto` takes the kernels where they run (CUDA from A100 on, float32 weights, blocks of Monarch
factors that they have the memory for) and torch elsewhere; what was taken is logged once. A kernel
that is asked for by name and cannot run is an error.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apex_composer.ops import reference
from apex_composer.settings import IMPLEMENTATIONS, check_choice

if TYPE_CHECKING:
    from apex_composer.triton_kernels import MonarchBatch

log = logging.getLogger(__name__)


@lru_cache
def resolve(implementation: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Which implementation runs for tensors of a device and dtype.

    Args:
        implementation: `auto`, `torch` or `triton`.
        device: the tensors'.
        dtype: the tensors', default float32.

    Returns:
        `torch` or `triton`.

    Raises:
        ValueError: for an unknown name, or where the kernels are asked for and cannot run.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "torch":
        return "torch"
    from apex_composer.triton_kernels import unavailable_reason

    reason = unavailable_reason(device)
    if dtype == torch.float64:
        reason = "the kernels do not compute in float64"
    if implementation == "triton" and reason is not None:
        raise ValueError(
            f"implementation: got triton, but {reason}. Allowed here: torch, auto (which takes it)"
        )
    if device.type == "cpu" and implementation == "auto":
        reason = "the device is the CPU"  # also where the kernels could be interpreted
    chosen = "triton" if reason is None else "torch"
    log.info("apex: %s on %s%s", chosen, device, "" if reason is None else f", because {reason}")
    return chosen


@lru_cache
def resolve_monarch(
    implementation: str, device: torch.device, dtype: torch.dtype, p: int, q: int
) -> str:
    """Which implementation runs the products of Monarch factors, whose blocks may be too large.

    Args:
        implementation: `auto`, `torch` or `triton`.
        device: the weights'.
        dtype: the weights'.
        p: rows of a block of L.
        q: rows of a block of R.

    Returns:
        `torch` or `triton`.

    Raises:
        ValueError: as `resolve`, and where the kernels are asked for and not for such blocks.
    """
    if resolve(implementation, device, dtype) == "torch":
        return "torch"
    from apex_composer.triton_kernels import monarch_unavailable_reason

    reason = monarch_unavailable_reason(device, p, q)
    if reason is None:
        return "triton"
    if implementation == "triton":
        raise ValueError(
            f"implementation: got triton, but {reason}. Allowed here: torch, auto (which takes "
            f"torch for operators of {p} x {q} blocks alone)"
        )
    log.info("apex: torch for operators of %s x %s blocks, because %s", p, q, reason)
    return "torch"


def unit_square_sums(
    activation: Tensor,
    unit_size: int,
    mask: Tensor | None = None,
    *,
    out: Tensor,
    implementation: str = "auto",
) -> None:
    """Write a_i(x)^2 of every sample and unit into `out`; see `reference.unit_square_sums`.

    Args:
        activation: [samples, tokens, units * unit_size], or without samples, with a mask.
        unit_size: head_dim for heads, 1 for channels.
        mask: [samples, tokens], true where a token counts; None counts every token.
        out: [samples, units], float32 (float64 for float64 activations).
        implementation: `auto`, `torch` or `triton`. Activations without a sample axis are left
            to torch: there is no kernel for them. Default `auto`.

    Raises:
        ValueError: as the reference, and as `resolve`.
    """
    chosen = resolve(implementation, activation.device, activation.dtype)
    if chosen == "torch" or activation.dim() == 2:
        out.copy_(reference.unit_square_sums(activation, unit_size, mask))
        return
    from apex_composer.triton_kernels import unit_square_sums as kernel

    kernel(activation, unit_size, mask, out=out)


def swiglu_kernel() -> Callable[..., Tensor]:
    """The fused silu(gate) * up, see `triton_kernels.swiglu`; its reference is eager torch."""
    from apex_composer.triton_kernels.swiglu import swiglu

    return swiglu


def monarch_kernels() -> type["MonarchBatch"]:
    """The fused fold and gradient map, see `triton_kernels.monarch`; its reference is `fold`,
    `map_gradient` of `reference`.
    """
    from apex_composer.triton_kernels import MonarchBatch

    return MonarchBatch
