"""The hot functions of `reference.py` for several operators of one size at once.

Shape legend
    m          operators, each n x n with n = p * q
    left       [m, q, p, p]      right  [m, p, q, q]
    selected   [m, n, d]  W[P] of every site, for the d columns that are at hand
    received   [m, n, d]  G[N] of every site
"""

import torch
from torch import Tensor

from apex_composer.ops.full_precision import bmm
from apex_composer.ops.monarch import MonarchFactors


@torch.no_grad()
def expand(factors: MonarchFactors, selected: Tensor) -> Tensor:
    """D = T W[P] for every operator (paper eq. 7-13).

    Args:
        factors: left [m, q, p, p] and right [m, p, q, q].
        selected: [m, n, d].

    Returns:
        [m, n, d].
    """
    middle = _right(factors, selected)
    return _joined(_blockwise(factors.left, middle.transpose(1, 2)).transpose(1, 2))


@torch.no_grad()
def map_gradient(
    factors: MonarchFactors, selected: Tensor, received: Tensor
) -> tuple[MonarchFactors, Tensor]:
    """The factors' gradients and T^T G[N], formulas in `reference.map_gradient`.

    Where the d columns are a part of the weight's, the gradients are that part's share: the
    sum of all parts is the whole.

    Args:
        factors: left [m, q, p, p] and right [m, p, q, q].
        selected: W[P], [m, n, d].
        received: G[N], [m, n, d].

    Returns:
        Gradients of L and R in the factors' shapes, and the addition to G[P], [m, n, d].
    """
    m, p, q, _ = factors.right.shape
    middle = _right(factors, selected).transpose(1, 2)  # [m, q, p, d], as L's blocks see it
    received = received.reshape(m, p, q, -1).transpose(1, 2)
    left_gradient = _blockwise(received, middle.transpose(2, 3))
    middle_gradient = _blockwise(factors.left.transpose(2, 3), received).transpose(1, 2)
    columns = selected.reshape(m, p, q, -1).transpose(2, 3)
    right_gradient = _blockwise(middle_gradient, columns)
    addition = _joined(_blockwise(factors.right.transpose(2, 3), middle_gradient))
    return MonarchFactors(left_gradient, right_gradient), addition


def _right(factors: MonarchFactors, selected: Tensor) -> Tensor:
    m, p, q, _ = factors.right.shape
    return _blockwise(factors.right, selected.reshape(m, p, q, selected.shape[-1]))


def _blockwise(blocks: Tensor, matrices: Tensor) -> Tensor:
    """One product per operator and block: [m, b, r, s] x [m, b, s, d] -> [m, b, r, d]."""
    product = bmm(blocks.flatten(0, 1), matrices.flatten(0, 1))
    return product.unflatten(0, blocks.shape[:2])


def _joined(blocks: Tensor) -> Tensor:
    """[m, p, q, d] -> [m, n, d]."""
    return blocks.flatten(1, 2)
