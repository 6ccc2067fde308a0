"""Unit norms and SwiGLU, compiled, against float64 and against eager torch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from checks import Check, Finding, differing, relative_error
from torch import Tensor

from apex_composer import triton_kernels
from apex_composer.ops import reference
from apex_composer.ops.dispatch import swiglu_kernel

# samples, tokens, units, unit size: heads and channels of TinyLLaMA and of LLaMA-2-7B, odd ones
NORMS = [
    (4, 4096, 32, 64), (4, 4096, 5632, 1), (4, 4096, 32, 128), (2, 4096, 11008, 1),
    (2, 4097, 3, 80), (3, 65, 7, 3), (4, 9, 1, 6), (1, 1, 1, 1),
]  # fmt: skip
# samples, tokens, channels
SWIGLUS = [(4, 4096, 5632), (2, 4096, 11008), (3, 65, 300), (3, 5, 7), (2, 1, 1)]
SMALL_NORMS = [(2, 9, 4, 6), (3, 7, 5, 1)]
SMALL_SWIGLUS = [(2, 9, 40), (3, 5, 7)]

_EPSILON = {torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}
# Sums of squares are accumulated in float32, whatever the activation's dtype.
_SUMS_BOUND = 5e-7
# Torch's exp on the CPU is an approximation of its own, which moves one value in 10,000.
_INTERPRETED_SHARE = 1e-3


def checks(device: torch.device, *, small: bool = False) -> Iterator[Check]:
    """One check for every shape and dtype, and one for every value that a half dtype has."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for size in SMALL_NORMS if small else NORMS:
        for dtype in dtypes:
            yield _check("K2 norms", _check_norms, size, dtype, device)
    if device.type != "cuda":
        dtypes.remove(torch.bfloat16)  # the interpreter rounds to it by cutting off
    for size in SMALL_SWIGLUS if small else SWIGLUS:
        for dtype in dtypes:
            yield _check("K3 SwiGLU", _check_swiglu, size, dtype, device)
    for dtype in dtypes[1:]:
        yield _check("K3 SwiGLU, every value", _check_every_value, (1, 2**16), dtype, device)


def _check(name: str, function, size: tuple, dtype: torch.dtype, device: torch.device) -> Check:
    return Check(f"{name} {list(size)} {_name(dtype)}", lambda: list(function(size, dtype, device)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(size: tuple, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def _mask(samples: int, tokens: int, device: torch.device) -> Tensor:
    """Padding at the end, more of it in every sample; the last one keeps one token."""
    kept = torch.linspace(tokens, 1, samples).long()
    return (torch.arange(tokens) < kept[:, None]).to(device)


def _check_norms(size: tuple, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    samples, tokens, units, unit_size = size
    activation = _normal((samples, tokens, units * unit_size), dtype, device, seed=17)
    for mask in (None, _mask(samples, tokens, device)):
        exact = reference.unit_square_sums(activation.double(), unit_size, mask)
        torchs = reference.unit_square_sums(activation, unit_size, mask)
        if mask is not None:
            activation[~mask] = float("nan")  # must not be read
        found, again = (
            triton_kernels.unit_square_sums(activation, unit_size, mask) for _ in range(2)
        )
        label = "sums" if mask is None else "masked sums"
        bound = max(2 * relative_error(torchs, exact), _SUMS_BOUND)
        yield Finding(label, relative_error(found, exact), bound)
        yield Finding(f"{label}: other bits in a second run", differing(found, again), 0.0)


def _eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _with_gradients(function, gate: Tensor, up: Tensor, incoming: Tensor) -> list[Tensor]:
    """The product and the gradients of gate and up."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    product = function(gate, up)
    return [product.detach(), *torch.autograd.grad(product, (gate, up), incoming)]


def _check_swiglu(size: tuple, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    kernel = swiglu_kernel()
    tensors = [_normal(size, dtype, device, seed) for seed in (17, 18, 19)]
    found, again, torchs = (_with_gradients(f, *tensors) for f in (kernel, kernel, _eager))
    exact = _with_gradients(_eager, *(tensor.double() for tensor in tensors))
    names = ("product", "gradient of gate", "gradient of up")
    for name, own, second, other, wanted in zip(names, found, again, torchs, exact, strict=True):
        bound = 2 * max(relative_error(other, wanted), _EPSILON[dtype])
        yield Finding(name, relative_error(own, wanted), bound)
        yield Finding(f"{name}: other bits in a second run", differing(own, second), 0.0)
    if dtype != torch.float32:
        yield _unequal_to_eager(found[0], torchs[0])
    yield from _check_sums(found[0], *tensors[:2])


def _check_sums(product: Tensor, gate: Tensor, up: Tensor) -> Iterator[Finding]:
    """Sums of squares are those of the rounded product, and do not change it."""
    for mask in (None, _mask(*gate.shape[:2], gate.device)):
        sums = torch.empty(gate.shape[0], gate.shape[2], device=gate.device)
        counted = swiglu_kernel()(gate, up, sums, mask)
        first = sums.clone()
        swiglu_kernel()(gate, up, sums, mask)
        exact = reference.unit_square_sums(product.double(), 1, mask)
        label = "sums" if mask is None else "masked sums"
        yield Finding(label, relative_error(first, exact), _SUMS_BOUND)
        yield Finding(f"{label}: other bits in a second run", differing(first, sums), 0.0)
        yield Finding(f"{label}: products that changed", differing(counted, product), 0.0)


def _check_every_value(size: tuple, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    """All values of a 16-bit dtype but NaN: the exponential has no weak spots."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    every = bits.view(dtype)
    every = every[~every.isnan()].unsqueeze(0)
    ones = torch.ones_like(every)
    yield _unequal_to_eager(swiglu_kernel()(every, ones), _eager(every, ones))


def _unequal_to_eager(found: Tensor, torchs: Tensor) -> Finding:
    bound = 0.0 if found.is_cuda else _INTERPRETED_SHARE
    return Finding("products that differ from eager mode's", differing(found, torchs), bound)
