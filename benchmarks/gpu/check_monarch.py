"""Fold and gradient map, compiled, against the float64 reference, at the shapes of real models."""

from collections.abc import Iterator

import torch
from checks import Check, Finding, differing, relative_error
from monarch_case import MonarchCase, Shape
from torch import Tensor

TINYLLAMA = [
    Shape("TinyLLaMA queries", 2048, 2048, 16, 16, axis=0, unit_size=64),
    Shape("TinyLLaMA attention output", 2048, 2048, 16, 16, axis=1, unit_size=64),
    Shape("TinyLLaMA keys", 256, 2048, 8, 8, axis=0, unit_size=64),
    Shape("keys, transposed", 256, 2048, 8, 8, axis=1, unit_size=64),
    Shape("TinyLLaMA gate", 5632, 2048, 22, 32, axis=0),
    Shape("TinyLLaMA down", 5632, 2048, 22, 32, axis=1),
]
LLAMA_2_7B = [
    Shape("LLaMA-2-7B queries", 4096, 4096, 16, 32, axis=0, unit_size=128),
    Shape("LLaMA-2-7B attention output", 4096, 4096, 16, 32, axis=1, unit_size=128),
    Shape("LLaMA-2-7B gate", 11008, 4096, 32, 43, axis=0),
    Shape("LLaMA-2-7B down", 11008, 4096, 32, 43, axis=1),
]
ODD = [
    Shape("odd", 2 * p * q + 3, width, p, q, axis=axis)
    for p, q, width in [
        (22, 32, 2047),
        (32, 33, 17),
        (3, 5, 131),
        (2, 70, 5),
        (66, 80, 300),
        (1, 3, 1),
    ]
    for axis in (0, 1)
]
SMALL = [Shape("small", 2 * p * q + 3, 20, p, q, axis=axis) for p, q in [(2, 4)] for axis in (0, 1)]

# tf32x3 adds up on matrix units, which cut off where float32 rounds: long sums (dL and dR are over
# the width) lose more. A fall back to plain tf32 would show as 4e-4.
_BOUNDS = {"tf32x3": (1e-6, 1e-5), "ieee": (1e-6, 3e-6)}


def checks(device: torch.device, *, small: bool = False) -> Iterator[Check]:
    """One check for every shape, and with `ieee` for the shapes of TinyLLaMA."""
    for shape in SMALL if small else [*TINYLLAMA, *LLAMA_2_7B, *ODD]:
        yield _check(shape, "tf32x3", device)
    for shape in SMALL[:1] if small else TINYLLAMA:
        yield _check(shape, "ieee", device)


def _check(shape: Shape, precision: str, device: torch.device) -> Check:
    def run() -> list[Finding]:
        case = MonarchCase(shape, device)
        return [
            *_check_fold(case, precision),
            *_check_unfold(case, precision),
            *_check_map(MonarchCase(shape, device), precision),
        ]

    return Check(f"K1 {shape} {precision}", run)


def _check_fold(case: MonarchCase, precision: str) -> Iterator[Finding]:
    before = _clones(case.weights)
    case.batch(precision).fold()
    first = _clones(case.weights)
    _restore(case.weights, before)
    case.batch(precision).fold()
    for place, start in enumerate(before):
        exact, by_torch = start.double(), start.clone()
        case.fold(place, exact)
        case.fold(place, by_torch)
        own, other, wanted = (
            case.rows(t)[case.disadvantageous[place]] for t in (first[place], by_torch, exact)
        )
        bound = max(_BOUNDS[precision][0], 4 * relative_error(other, wanted))
        yield Finding("fold: W[N]", relative_error(own, wanted), bound)
        yield Finding("fold by torch: W[N]", relative_error(other, wanted), _BOUNDS["ieee"][0])
        kept = torch.cat([case.advantageous[place], case.spare[place]])
        changed = differing(case.rows(first[place])[kept], case.rows(start)[kept])
        yield Finding("fold: other rows that changed", changed, 0.0)
        again = differing(case.weights[place], first[place])
        yield Finding("fold: other bits in a second run", again, 0.0)


def _check_unfold(case: MonarchCase, precision: str) -> Iterator[Finding]:
    """From W[N] = 0 a fold writes T W[P], so that unfolding must come back to 0 exactly."""
    for weight, chosen in zip(case.weights, case.disadvantageous, strict=True):
        case.rows(weight)[chosen] = 0
    batch = case.batch(precision)
    batch.fold(+1)
    batch.fold(-1)
    for weight, chosen in zip(case.weights, case.disadvantageous, strict=True):
        rest = float(case.rows(weight)[chosen].abs().max())
        yield Finding("unfold: what is left of 0", rest, 0.0)


def _check_map(case: MonarchCase, precision: str) -> Iterator[Finding]:
    weights, before = _clones(case.weights), _clones(case.gradients)
    factors = [_clones(own) for own in case.batch(precision).map_gradient(case.gradients)]
    first = _clones(case.gradients)
    _restore(case.gradients, before)
    again = case.batch(precision).map_gradient(case.gradients)
    for place, start in enumerate(before):
        own = (factors[0][place], factors[1][place], first[place])
        yield from _compare_map(case, place, start, own, precision)
        pairs = [
            (case.gradients[place], first[place]),
            *((again[side][place], factors[side][place]) for side in (0, 1)),
        ]
        bits = max(differing(*pair) for pair in pairs)
        yield Finding("map: other bits in a second run", bits, 0.0)
        changed = differing(case.weights[place], weights[place])
        yield Finding("map: weights that changed", changed, 0.0)


def _compare_map(
    case: MonarchCase, place: int, start: Tensor, own: tuple[Tensor, ...], precision: str
) -> Iterator[Finding]:
    weight, exact, by_torch = case.weights[place], start.double(), start.clone()
    wanted = (*case.map_gradient(place, weight.double(), exact), exact)
    other = (*case.map_gradient(place, weight, by_torch), by_torch)
    chosen = case.advantageous[place]
    for name, *results in zip(("dL", "dR", "G[P]"), own, other, wanted, strict=True):
        if name == "G[P]":
            results = [case.rows(result)[chosen] for result in results]
        found, torchs, exact_result = results
        floor = _BOUNDS[precision][name != "G[P]"]
        error = relative_error(torchs, exact_result)
        bound = max(floor, 4 * error)
        yield Finding(f"map: {name}", relative_error(found, exact_result), bound)
        yield Finding(f"map by torch: {name}", error, _BOUNDS["ieee"][name != "G[P]"])
    kept = torch.cat([case.disadvantageous[place], case.spare[place]])
    changed = differing(case.rows(own[2])[kept], case.rows(start)[kept])
    yield Finding("map: other rows that changed", changed, 0.0)


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
