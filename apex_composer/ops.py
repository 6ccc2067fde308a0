"""Which implementation runs: plain torch, or the Triton kernels. The only file that imports them.

`auto` takes the kernels where they run (CUDA from A100 on, float32 weights) and torch elsewhere;
what was taken is logged once. A kernel that is asked for by name and cannot run is an error.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from apex_composer import reference
from apex_composer.expansion import ExpansionOperator, as_matrix
from apex_composer.settings import IMPLEMENTATIONS, check_choice

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Acts on the weights and gradients of one or several sites, for their operators.

    Attributes:
        folded: whether the parameters hold the effective weights, as they do outside of steps.
    """

    folded: bool

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P]."""

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P]."""

    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""


@lru_cache
def resolve(implementation: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Which implementation runs for tensors of a device and dtype.

    Args:
        implementation: `auto`, `torch` or `triton`.
        device: of the tensors.
        dtype: of the tensors, default float32.

    Returns:
        `torch` or `triton`.

    Raises:
        ValueError: for an unknown name, or where the kernels are asked for and cannot run.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "torch":
        return "torch"
    reason = _unavailable_reason(device, dtype)
    if implementation == "triton" and reason is not None:
        raise ValueError(
            f"implementation: got triton, but {reason}. Allowed here: torch, auto (which takes it)"
        )
    if device.type == "cpu" and implementation == "auto":
        reason = "the device is the CPU"  # also where the kernels could be interpreted
    chosen = "triton" if reason is None else "torch"
    log.info("apex: %s on %s%s", chosen, device, "" if reason is None else f", because {reason}")
    return chosen


def _unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    from apex_composer.triton_kernels import unavailable_reason

    if dtype == torch.float64:
        return "the kernels do not compute in float64"
    return unavailable_reason(device)


def make_executors(
    operators: Sequence[ExpansionOperator], implementation: str = "auto"
) -> list[Executor]:
    """Executors that together act for all operators.

    Args:
        operators: of one stage.
        implementation: `auto`, `torch` or `triton`. Default `auto`.

    Raises:
        ValueError: as `resolve`.
    """
    weight = operators[0].site.weight
    if resolve(implementation, weight.device, weight.dtype) == "torch":
        return list(operators)
    groups: dict[tuple, list[ExpansionOperator]] = {}
    for operator in operators:
        parameters = operator.site.parameters()
        layout = tuple((parameter.shape, parameter.stride()) for parameter in parameters)
        key = (layout, operator.site.axis, len(operator.advantageous))
        groups.setdefault(key, []).append(operator)
    return [KernelExecutor(group) for group in groups.values()]


class KernelExecutor:
    """The operators of all weights of one shape, each step of theirs in two or three launches.

    Equals what the operators do one by one (`expansion.ExpansionOperator`, the reference). D = T
    W[P] is computed again to unfold: W[P] is unchanged since the fold, so it has the same bits.

    Args:
        operators: of weights alike in shape, strides, axis and n.
    """

    def __init__(self, operators: Sequence[ExpansionOperator]):
        from apex_composer.triton_kernels import MonarchBatch

        self.folded = True
        self._operators = operators
        self._parameters = list(zip(*(o.site.parameters() for o in operators), strict=True))
        self._batches = [
            MonarchBatch(
                # The parameter itself: its memory may be replaced, and is looked up at every call.
                [p if p.dim() == 2 else as_matrix(p) for p in parameters],
                [o.factors.left for o in operators],
                [o.factors.right for o in operators],
                [o.advantageous for o in operators],
                [o.disadvantageous for o in operators],
                axis=operators[0].site.axis,
            )
            for parameters in self._parameters
        ]

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P] for every weight, and bias."""
        for batch in self._batches:
            batch.fold(+1)
        self.folded = True

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P] for every weight, and bias."""
        for batch in self._batches:
            batch.fold(-1)
        self.folded = False

    def map_gradient(self) -> None:
        """As `ExpansionOperator.map_gradient`, for every weight, and bias."""
        for operator in self._operators:
            for factor in operator.factors:
                factor.grad = None
        for batch, parameters in zip(self._batches, self._parameters, strict=True):
            gradients = [p.grad if p.grad is None else as_matrix(p.grad) for p in parameters]
            for factors, *found in zip(
                (operator.factors for operator in self._operators),
                *batch.map_gradient(gradients),
                strict=True,
            ):
                for factor, part in zip(factors, found, strict=True):
                    if part is not None:
                        factor.grad = part if factor.grad is None else factor.grad + part


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
