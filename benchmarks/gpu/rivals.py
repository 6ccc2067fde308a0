"""What the kernels are compared with: eager torch, Liger's SwiGLU, two bmm with gather and scatter.

Each is a function that launches its work on tensors that are there already.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import is_importable
from monarch_case import MonarchCase
from torch import Tensor

from apex_composer.ops import reference

Launch = Callable[[], object]


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As Hugging Face computes it."""
    return F.silu(gate) * up


def liger_swiglu() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger-Kernel's silu(gate) * up; None where it is not installed.

    Its backward pass writes the gradients over gate and up. That changes the numbers of a repeated
    measurement, not its time.
    """
    if not is_importable("liger_kernel.ops.swiglu"):
        return None
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def forward_of(swiglu: Callable, gate: Tensor, up: Tensor) -> Launch:
    """A forward pass that keeps what the backward pass needs, as in training."""
    return lambda: swiglu(gate, up)


def backward_of(swiglu: Callable, gate: Tensor, up: Tensor, incoming: Tensor) -> Launch:
    """A backward pass that can be repeated."""
    product = swiglu(gate, up)
    return lambda: torch.autograd.grad(product, (gate, up), incoming, retain_graph=True)


def fold_by_bmm(case: MonarchCase) -> Launch:
    """The reference, matrix by matrix: gather, two bmm, scatter."""

    def launch() -> None:
        for place, weight in enumerate(case.weights):
            case.fold(place, weight)

    return launch


def map_gradient_by_bmm(case: MonarchCase) -> Launch:
    """The reference, matrix by matrix."""

    def launch() -> None:
        for place, (weight, gradient) in enumerate(zip(case.weights, case.gradients, strict=True)):
            case.map_gradient(place, weight, gradient)

    return launch


def norms_by_torch(activation: Tensor, unit_size: int) -> Launch:
    """vector_norm over the tokens, then the sum over each unit's columns."""
    return lambda: reference.unit_square_sums(activation, unit_size)
