"""The kernels whose bandwidth is measured, at the sizes of real models, and what they replace."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import checkout
import torch
from monarch_case import MonarchCase, Shape
from traffic import Traffic

checkout.activate()

import rivals  # noqa: E402
import traffic  # noqa: E402

from apex_composer import triton_kernels  # noqa: E402
from apex_composer.ops.dispatch import swiglu_kernel  # noqa: E402

# All the weights of TinyLLaMA-1.1B, as the kernels take them: each kind in one launch. Its 4 KV
# heads are too few for a threshold of 12.5 %. Of LLaMA-2-7B, some layers.
SHAPES = [
    Shape("TinyLLaMA gate and up", 5632, 2048, 22, 32, axis=0, matrices=44),
    Shape("TinyLLaMA down", 5632, 2048, 22, 32, axis=1, matrices=22),
    Shape("TinyLLaMA queries", 2048, 2048, 16, 16, axis=0, unit_size=64, matrices=22),
    Shape("TinyLLaMA attention output", 2048, 2048, 16, 16, axis=1, unit_size=64, matrices=22),
    Shape("LLaMA-2-7B gate and up", 11008, 4096, 32, 43, axis=0, matrices=8),
    Shape("LLaMA-2-7B down", 11008, 4096, 32, 43, axis=1, matrices=8),
]
# samples, tokens, units, unit size; the channels' are also those of SwiGLU
NORMS = {"heads": (4, 4096, 32, 64), "channels": (4, 4096, 5632, 1)}
SMALL_SHAPES = [
    Shape("small", 19, 20, 2, 4, axis=0, matrices=3),
    Shape("small", 19, 20, 2, 4, axis=1, matrices=3),
]
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
    launch: Callable[[], object]
    traffic: Traffic
    others: dict[str, Callable[[], object] | None]


def swiglu_cases(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Forward, forward with sums of squares, backward."""
    samples, tokens, width, _ = size
    gate, up = (
        torch.randn(samples, tokens, width, device=device).to(dtype).requires_grad_()
        for _ in range(2)
    )
    incoming, kernel = torch.randn_like(gate), swiglu_kernel()
    sums = torch.empty(samples, width, device=device)
    contestants = {"eager": rivals.eager_swiglu, "Liger": rivals.liger_swiglu()}
    elements, size_of = gate.numel(), gate.element_size()
    forward = {
        name: swiglu and rivals.forward_of(swiglu, gate, up) for name, swiglu in contestants.items()
    }
    passes = traffic.elementwise(elements, size_of, "gate, up, product", 3)
    yield Case("K3", "SwiGLU forward", rivals.forward_of(kernel, gate, up), passes, forward)
    yield Case("K3", "SwiGLU forward with sums", lambda: kernel(gate, up, sums), passes, forward)
    passes = traffic.elementwise(
        elements, size_of, "incoming, gate, up, gradients of gate and up", 5
    )
    launch = rivals.backward_of(kernel, gate, up, incoming)
    backward = {
        name: swiglu and rivals.backward_of(swiglu, gate, up, incoming)
        for name, swiglu in contestants.items()
    }
    yield Case("K3", "SwiGLU backward", launch, passes, backward)


def norm_cases(
    name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Sums of squares of heads or channels."""
    samples, tokens, units, unit_size = size
    activation = torch.randn(samples, tokens, units * unit_size, device=device).to(dtype)
    out = torch.empty(samples, units, device=device)
    passes = traffic.elementwise(activation.numel(), activation.element_size(), "the activation", 1)
    others = {"torch": rivals.norms_by_torch(activation, unit_size)}

    def launch() -> None:
        triton_kernels.unit_square_sums(activation, unit_size, out=out)

    yield Case("K2", f"norms of {name}", launch, passes, others)


def monarch_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Fold and gradient map of all matrices of a shape."""
    case = MonarchCase(shape, device)
    batch = case.batch()
    others = {"bmm": rivals.fold_by_bmm(case)}
    yield Case("K1", f"fold {shape} x{shape.matrices}", batch.fold, traffic.fold(case), others)
    others = {"bmm": rivals.map_gradient_by_bmm(case)}

    def launch() -> None:
        batch.map_gradient(case.gradients)

    what = f"map gradient {shape} x{shape.matrices}"
    yield Case("K1", what, launch, traffic.map_gradient(case), others)


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
