"""Small cases, exact results of any case, and what results are compared by."""

import pytest
import torch
from monarch_case import MonarchCase, Shape
from torch import Tensor

from apex_composer.ops.monarch import MonarchFactors

SPARE = 3
compared: list[tuple[float, float]] = []


def on_gpus(values: list) -> list:
    """Parameters that are too large, or too much of GPUs, for the interpreter."""
    return [
        pytest.param(*(value if type(value) is tuple else [value]), marks=pytest.mark.gpu)
        for value in values
    ]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float((found.double() - exact).norm() / exact.norm())


def check_error(found: Tensor, exact: Tensor, bound: float) -> None:
    """A relative error within its bound (NaN never is), which a report can tell of."""
    error = relative_error(found, exact)
    compared.append((error, bound))
    assert error <= bound


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals NaN."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )


def ragged_mask(samples: int, tokens: int, device: torch.device) -> Tensor:
    """Padding on the left, more of it in every sample; the last one keeps one token."""
    kept = torch.linspace(tokens, 1, samples).long()
    return (torch.arange(tokens) >= tokens - kept[:, None]).to(device)


def odd_shape(p: int, q: int, width: int, axis: int, matrices: int = 2) -> Shape:
    """With some rows in neither set, which no tile is a multiple of."""
    return Shape(f"{p} x {q}", 2 * p * q + SPARE, width, p, q, axis, matrices=matrices)


def small_case(p: int, q: int, width: int, axis: int, device, matrices: int = 2) -> MonarchCase:
    """A case of an odd shape."""
    return MonarchCase(odd_shape(p, q, width, axis, matrices), device, mixed=True)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones."""
    return [tensor.clone() for tensor in tensors]


def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Write values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def folded(case: MonarchCase, place: int) -> Tensor:
    """W_eff of one matrix in float64."""
    weight = case.weights[place].double()
    case.fold(place, weight)
    return weight


def mapped(case: MonarchCase, place: int, gradient: Tensor) -> tuple[Tensor, MonarchFactors]:
    """G after the map, and the factors' gradients, of one matrix in float64."""
    gradient = gradient.double()
    return gradient, case.map_gradient(place, case.weights[place].double(), gradient)


def chosen_error(case: MonarchCase, place: int, found: Tensor, exact: Tensor) -> float:
    """relative_error over the rows in P and N."""
    rows = torch.cat(case.sets(place))
    return relative_error(case.rows(found)[rows], case.rows(exact)[rows])
