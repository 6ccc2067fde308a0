"""Monarch factors: the n x n expansion operator T = Pm L Pm^T R as two block-diagonal matrices.

Shape legend
    n = p * q   rows that T maps, p <= q as near to sqrt(n) as the divisors of n allow
    d           columns that ride along
    left   L    [q, p, p]: q blocks of p x p
    right  R    [p, q, q]: p blocks of q x q
Products take operators of one size at once too: all shapes may have the same dimensions in front.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from apex_composer.ops.full_precision import bmm

# With a more lopsided pair T would be closer to a dense matrix than to a Monarch one (our choice).
MAX_RATIO = 4


class MonarchFactors(NamedTuple):
    """The two block-diagonal factors of a Monarch matrix (paper eq. 13)."""

    left: Tensor
    right: Tensor


def has_factor_pair(size: int) -> bool:
    """Whether `size` = p * q with q / p at most 4."""
    p = _largest_divisor_up_to_root(size)
    return size // p <= MAX_RATIO * p


def factor_pair(size: int) -> tuple[int, int]:
    """Split `size` into p * q with p <= q nearest to its square root.

    Args:
        size: rows that the operator maps, at least 1.

    Returns:
        (p, q), for example 704 -> (22, 32) and 256 -> (16, 16).

    Raises:
        ValueError: if the nearest pair is more lopsided than 1 : 4.
    """
    if size < 1:
        raise ValueError(f"a Monarch operator needs at least 1 row, got {size}")
    p = _largest_divisor_up_to_root(size)
    if not has_factor_pair(size):
        smaller = next(n for n in range(size - 1, 0, -1) if has_factor_pair(n))
        raise ValueError(
            f"{size} rows have no factor pair with a ratio of at most {MAX_RATIO} (nearest: {p} x "
            f"{size // p}): use {smaller} rows instead"
        )
    return p, size // p


def _largest_divisor_up_to_root(size: int) -> int:
    return next(p for p in range(math.isqrt(size), 0, -1) if size % p == 0)


def init_factors(
    size: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MonarchFactors:
    """Fresh factors with T = 0: L is zero, R is drawn from N(0, 1/q).

    The paper says that one factor is zero and the other random (section 3.2); the variance 1/q,
    which lets R keep the size of what it multiplies, is our choice. R is drawn in float32 on the
    generator's device and then cast, so that every device and rank draws the same numbers.

    Args:
        size: n, the rows that the operator maps.
        generator: source of R's numbers.
        dtype: the factors', default float32.
        device: the factors', default the CPU.
    """
    p, q = factor_pair(size)
    right = torch.randn(p, q, q, generator=generator, device=generator.device) / math.sqrt(q)
    left = torch.zeros(q, p, p, dtype=dtype, device=device)
    return MonarchFactors(left, right.to(device=device, dtype=dtype))


def multiply_right(factors: MonarchFactors, matrix: Tensor) -> Tensor:
    """Z[i] = R[i] @ X[i], the first of the two block-diagonal products.

    Args:
        factors: L and R of an n x n operator.
        matrix: X, [n, d].

    Returns:
        Z, [p, q, d].
    """
    return bmm(factors.right, in_blocks(factors, matrix))


def multiply_left(factors: MonarchFactors, middle: Tensor) -> Tensor:
    """Y[j] = L[j] @ Z[:, j], the second block-diagonal product, put back into X's row order.

    Args:
        factors: L and R of an n x n operator.
        middle: Z, [p, q, d].

    Returns:
        T @ X, [n, d].
    """
    product = bmm(factors.left, middle.transpose(-3, -2))
    return product.transpose(-3, -2).flatten(-3, -2)


def in_blocks(factors: MonarchFactors, matrix: Tensor) -> Tensor:
    """[n, d] as the blocks of R see it, [p, q, d]."""
    return matrix.unflatten(-2, factors.right.shape[-3:-1])


def multiply(factors: MonarchFactors, matrix: Tensor) -> Tensor:
    """T @ X = Pm L Pm^T R X in n (p + q) d multiply-adds instead of n n d (paper eq. 13).

    Args:
        factors: L and R of an n x n operator.
        matrix: X, [n, d], same dtype and device.

    Returns:
        T @ X, [n, d]; differentiable in the factors and in X, see `full_precision.bmm`.
    """
    return multiply_left(factors, multiply_right(factors, matrix))


def add_gradients(factors: MonarchFactors, gradients: Iterable[Tensor | None]) -> None:
    """Add to the factors' `.grad` what there is, as a backward pass does."""
    for factor, gradient in zip(factors, gradients, strict=True):
        if gradient is not None:
            factor.grad = gradient if factor.grad is None else factor.grad + gradient


def to_dense(factors: MonarchFactors) -> Tensor:
    """T as an ordinary [n, n] matrix; slow, for tests and analysis."""
    size = factors.left.shape[0] * factors.left.shape[1]
    identity = torch.eye(size, dtype=factors.left.dtype, device=factors.left.device)
    return multiply(factors, identity)
