"""The kernels whose bandwidth is measured, at the sizes of real models, and what they replace."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import traffic
from machine import is_importable
from monarch_case import LLAMA_2_7B, TINYLLAMA, MonarchCase, Shape
from torch import Tensor

from apex_composer import triton_kernels
from apex_composer.ops import reference
from apex_composer.ops.dispatch import swiglu_kernel

Launch = Callable[[], object]

# All the weights of TinyLLaMA-1.1B, as the kernels take them: each kind in one launch. Its 4 KV
# heads are too few for a threshold of 12.5 %. Of LLaMA-2-7B, some layers.
SHAPES = [
    shape._replace(matrices=44 if shape.name.endswith("gate and up") else 22)
    for shape in TINYLLAMA[:4]
] + [shape._replace(matrices=8) for shape in LLAMA_2_7B[:2]]
# samples, tokens, units, unit size; the channels' are also those of SwiGLU
NORMS = {"heads": (4, 4096, 32, 64), "channels": (4, 4096, 5632, 1)}
SMALL_SHAPES = [Shape("small", 19, 20, 2, 4, axis=axis, matrices=3) for axis in (0, 1)]
SMALL_NORMS = {"heads": (2, 9, 4, 6), "channels": (2, 9, 20, 1)}


class Case(NamedTuple):
    """A kernel, and the others that do the same.

    Attributes:
        kernel: K1, K2 or K3.
        what: it does, and on what.
        launch: of the kernel.
        traffic: that it causes.
        others: launches by name; None where one is not installed.
    """

    kernel: str
    what: str
    launch: Launch
    traffic: traffic.Traffic
    others: dict[str, Launch | None]


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


def backward_of(swiglu: Callable, gate: Tensor, up: Tensor, incoming: Tensor) -> Launch:
    """A backward pass that can be repeated."""
    product = swiglu(gate, up)
    return lambda: torch.autograd.grad(product, (gate, up), incoming, retain_graph=True)


def fold_by_bmm(case: MonarchCase) -> None:
    """The reference, matrix by matrix: gather, two bmm, scatter."""
    for place, weight in enumerate(case.weights):
        case.fold(place, weight)


def map_gradient_by_bmm(case: MonarchCase) -> None:
    """The reference, matrix by matrix."""
    for place, (weight, gradient) in enumerate(zip(case.weights, case.gradients, strict=True)):
        case.map_gradient(place, weight, gradient)


def swiglu_cases(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Forward, forward with sums of squares, backward."""
    samples, tokens, width, _ = size
    gate, up = (
        torch.randn(samples, tokens, width, device=device).to(dtype).requires_grad_()
        for _ in range(2)
    )
    incoming, kernel = torch.randn_like(gate), swiglu_kernel()
    sums = torch.empty(samples, width, device=device)
    contestants = {"eager": eager_swiglu, "Liger": liger_swiglu()}
    size_of = gate.numel(), gate.element_size()

    def rivals(launch_of: Callable[..., Launch], *tensors: Tensor) -> dict[str, Launch | None]:
        return {name: one and launch_of(one, *tensors) for name, one in contestants.items()}

    passes = traffic.elementwise(*size_of, "gate, up, product", 3)
    # Forward passes keep what the backward pass needs, as in training.
    forward = rivals(partial, gate, up)
    yield Case("K3", "SwiGLU forward", partial(kernel, gate, up), passes, forward)
    yield Case("K3", "SwiGLU forward with sums", partial(kernel, gate, up, sums), passes, forward)
    passes = traffic.elementwise(*size_of, "incoming, gate, up, gradients of gate and up", 5)
    tensors = gate, up, incoming
    launch = backward_of(kernel, *tensors)
    yield Case("K3", "SwiGLU backward", launch, passes, rivals(backward_of, *tensors))


def norm_cases(
    name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Sums of squares of heads or channels."""
    samples, tokens, units, unit_size = size
    activation = torch.randn(samples, tokens, units * unit_size, device=device).to(dtype)
    out = torch.empty(samples, units, device=device)
    passes = traffic.elementwise(activation.numel(), activation.element_size(), "the activation", 1)
    yield Case(
        "K2",
        f"norms of {name}",
        lambda: triton_kernels.unit_square_sums(activation, unit_size, out=out),
        passes,
        {"torch": lambda: reference.unit_square_sums(activation, unit_size)},
    )


def monarch_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Fold and gradient map of all matrices of a shape."""
    case = MonarchCase(shape, device)
    batch, of = case.batch(), f"{shape} x{shape.matrices}"
    others = {"bmm": lambda: fold_by_bmm(case)}
    yield Case("K1", f"fold {of}", batch.fold, traffic.fold(case), others)
    others = {"bmm": lambda: map_gradient_by_bmm(case)}
    launch = partial(batch.map_gradient, case.gradients)
    yield Case("K1", f"map gradient {of}", launch, traffic.map_gradient(case), others)


def all_cases(device: torch.device, *, small: bool) -> Iterator[Iterator[Case]]:
    """Groups of cases; the tensors of a group are made when it is reached."""
    # The interpreter does not round to bfloat16 as a GPU does.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    norms = SMALL_NORMS if small else NORMS
    yield swiglu_cases(norms["channels"], dtype, device)
    for name, size in norms.items():
        yield norm_cases(name, size, dtype, device)
    for shape in SMALL_SHAPES if small else SHAPES:
        yield monarch_cases(shape, device)
