"""The hot functions in plain torch: the definition of what a kernel must compute, and the CPU path.

Shape legend (axis 0; axis 1 is the transpose)
    W, G   [rows, d]  a weight and its gradient dLoss/dW_eff
    P, N   [n]        row indices of the advantageous and the disadvantageous units
    X      [n, d]     W[P]
"""

import torch
from torch import Tensor

from apex_composer.ops.full_precision import bmm
from apex_composer.ops.monarch import MonarchFactors, in_blocks, multiply, multiply_right
from apex_composer.ops.packed_samples import PackedSamples

_TOKENS_AT_ONCE = 32
_COLUMNS_AT_ONCE = 1024


def take(matrix: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The rows (axis 0) of a matrix, or its columns (axis 1) as rows.

    Args:
        matrix: [rows, columns].
        indices: [n], int64.
        axis: 0 or 1.

    Returns:
        [n, d] with d the length of the other axis.
    """
    # Columns are gathered as rows of the transpose: one contiguous [n, d] for either axis.
    return (matrix if axis == 0 else matrix.t()).index_select(0, indices)


@torch.no_grad()
def fold(
    weight: Tensor,
    factors: MonarchFactors,
    advantageous: Tensor,
    disadvantageous: Tensor,
    *,
    axis: int,
    sign: int = 1,
) -> None:
    """W[N] <- W[N] + sign * T W[P], in place (paper eq. 7-12).

    Args:
        weight: W, [rows, columns].
        factors: L and R of T, n x n.
        advantageous: P, [n] indices along `axis`.
        disadvantageous: N, [n] indices along `axis`, disjoint from P.
        axis: 0 expands rows, 1 columns.
        sign: +1 folds the operator in, -1 takes it out again.
    """
    delta = expand(weight, factors, advantageous, axis=axis)
    add(weight, delta, disadvantageous, axis=axis, sign=sign)


@torch.no_grad()
def expand(weight: Tensor, factors: MonarchFactors, advantageous: Tensor, *, axis: int) -> Tensor:
    """D = T W[P], in the layout of the weight.

    Args:
        weight: W, [rows, columns].
        factors: L and R of T, n x n.
        advantageous: P, [n] indices along `axis`.
        axis: 0 for rows, 1 for columns.

    Returns:
        [n, columns] for axis 0, [rows, n] for axis 1.
    """
    delta = multiply(factors, take(weight, advantageous, axis))
    return delta if axis == 0 else delta.t()


@torch.no_grad()
def add(
    weight: Tensor, delta: Tensor, disadvantageous: Tensor, *, axis: int, sign: int = 1
) -> None:
    """W[N] <- W[N] + sign * D, in place.

    Args:
        weight: W, [rows, columns].
        delta: D of `expand`.
        disadvantageous: N, [n] indices along `axis`.
        axis: 0 for rows, 1 for columns.
        sign: +1 or -1.
    """
    weight.index_add_(axis, disadvantageous, delta, alpha=sign)


@torch.no_grad()
def map_gradient(
    weight: Tensor,
    gradient: Tensor,
    factors: MonarchFactors,
    advantageous: Tensor,
    disadvantageous: Tensor,
    *,
    axis: int,
) -> MonarchFactors:
    """From dLoss/dW_eff to the factors' gradients and, in place, to dLoss/dW.

    dL and dR are those of `product_gradients`, with what comes through T added to G[P]:
        G[P] += T^T G[N].
    G[N] stays as it is: dLoss/dW[N] = dLoss/dW_eff[N]. P and N are disjoint, so W[P] is the
    same before and after a fold.

    Args:
        weight: W_eff or W (only W[P] is read), [rows, columns].
        gradient: G, same shape, changed in place.
        factors: L and R of T, n x n.
        advantageous: P, [n] indices along `axis`.
        disadvantageous: N, [n] indices along `axis`.
        axis: 0 for rows, 1 for columns.

    Returns:
        Gradients of L and R.
    """
    selected, received = take(weight, advantageous, axis), take(gradient, disadvantageous, axis)
    mapped, addition = product_gradients(factors, selected, received)
    add(gradient, addition if axis == 0 else addition.t(), advantageous, axis=axis)
    return mapped


@torch.no_grad()
def product_gradients(
    factors: MonarchFactors, selected: Tensor, received: Tensor
) -> tuple[MonarchFactors, Tensor]:
    """The gradients of the product T X = Pm L Pm^T R X in L, R and X.

    With Z = R X and Gy = G[N], both as [q, p, d]:
        dL[j] = Gy[j] Z[j]^T,   dZ[j] = L[j]^T Gy[j],
    and with dZ and X as [p, q, d]:
        dR[i] = dZ[i] X[i]^T,   T^T G[N] = R^T dZ.
    Of a part of the columns d, dL and dR are that part's share: those of all parts add up.

    Args:
        factors: L [..., q, p, p] and R [..., p, q, q] of one operator, or of several.
        selected: X = W[P], [..., n, d].
        received: G[N], [..., n, d].

    Returns:
        dL and dR in the factors' shapes, and T^T G[N], [..., n, d].
    """
    middle = multiply_right(factors, selected).transpose(-3, -2)
    received = in_blocks(factors, received).transpose(-3, -2)
    left_gradient = bmm(received, middle.mT)
    middle_gradient = bmm(factors.left.mT, received).transpose(-3, -2)
    right_gradient = bmm(middle_gradient, in_blocks(factors, selected).mT)
    addition = bmm(factors.right.mT, middle_gradient).flatten(-3, -2)
    return MonarchFactors(left_gradient, right_gradient), addition


@torch.no_grad()
def unit_square_sums(activation: Tensor, unit_size: int, mask: Tensor | None = None) -> Tensor:
    """a_i(x)^2: per sample and unit, the sum of squares of the unit's activation (paper eq. 3).

    Args:
        activation: [samples, tokens, units * unit_size], any floating dtype; or, where a model
            drops padding before the projection, [kept tokens, units * unit_size] with `mask`.
        unit_size: head_dim for heads, 1 for channels.
        mask: [samples, tokens], true where a token counts; None counts every token.

    Returns:
        [samples, units] in float32 (float64 for float64 activations).

    Raises:
        ValueError: for two-dimensional activations whose samples the mask does not tell.
    """
    dtype = torch.promote_types(activation.dtype, torch.float32)
    if activation.dim() == 2:
        return _sum_unpadded(activation.to(dtype), unit_size, mask)
    if mask is not None:
        if mask.shape != activation.shape[:2]:
            raise ValueError(
                f"the attention mask is for {tuple(mask.shape)} samples and tokens, the activation "
                f"has {tuple(activation.shape[:2])}: give each forward pass its own mask"
            )
        activation = activation.masked_fill(~mask.bool().unsqueeze(-1), 0)
    return _sum_units(_sum_tokens(activation, dtype), unit_size)


@torch.no_grad()
def packed_square_sums(activation: Tensor, unit_size: int, samples: PackedSamples) -> Tensor:
    """As `unit_square_sums`, where a row holds several samples.

    The order of the sums is fixed, on GPUs too (index_add_'s is not).

    Args:
        activation: [rows, tokens, units * unit_size], any floating dtype; or, where a model drops
            padding before the projection, [kept tokens, units * unit_size].
        unit_size: head_dim for heads, 1 for channels.
        samples: those of the same rows and tokens.

    Returns:
        [runs, units] in float32 (float64 for float64 activations), 0 for runs of padding.

    Raises:
        ValueError: for an activation of other tokens.
    """
    dtype = torch.promote_types(activation.dtype, torch.float32)
    unpadded = activation.dim() == 2
    tokens = (samples.tokens,) if unpadded else tuple(samples.counted.shape)
    if activation.shape[:-1] != tokens:
        raise ValueError(
            f"the sequence ids are for {tokens} tokens, the activation has "
            f"{tuple(activation.shape[:-1])}: give each forward pass its own ids"
        )
    full = unpadded or samples.tokens == samples.counted.numel()
    skipped = None if full else ~samples.counted.view(-1, 1)
    lengths = samples.kept if unpadded else samples.lengths
    sums = []
    # Some columns at a time: their squares are written out before they are summed.
    for columns in activation.reshape(-1, activation.shape[-1]).split(_COLUMNS_AT_ONCE, dim=1):
        columns = columns.to(dtype) if full else columns.to(dtype).masked_fill(skipped, 0)
        sums.append(
            torch.segment_reduce(columns.square(), "sum", lengths=lengths, unsafe=True, initial=0)
        )
    return _sum_units(torch.cat(sums, dim=1), unit_size)


def _sum_tokens(activation: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of squares over the tokens, [samples, tokens, n] -> [samples, n], in one pass.

    On the CPU a few tokens at a time are added up in a buffer that stays in the cache: 7 times
    faster than vector_norm over a dimension that is not the last. On the GPU vector_norm is one
    kernel without a temporary of the activation's size.
    """
    if activation.is_cuda:
        return torch.linalg.vector_norm(activation, dim=1, dtype=dtype).square()
    samples, _, width = activation.shape
    total = torch.zeros(samples, _TOKENS_AT_ONCE, width, dtype=dtype)
    for chunk in activation.split(_TOKENS_AT_ONCE, dim=1):
        chunk = chunk.to(dtype)
        total[:, : chunk.shape[1]].addcmul_(chunk, chunk)
    return total.sum(dim=1)


def _sum_unpadded(activation: Tensor, unit_size: int, mask: Tensor | None) -> Tensor:
    if mask is None or int(mask.sum()) != activation.shape[0]:
        raise ValueError(
            f"an activation of shape {tuple(activation.shape)} has no sample axis, and the "
            f"attention mask ({'none' if mask is None else int(mask.sum())} tokens) does not tell "
            "which sample each token belongs to: keep padding in the model's FFN "
            "(MPT: use_pad_tok_in_ffn: true)"
        )
    kept = mask.count_nonzero(dim=1)
    sums = torch.segment_reduce(activation.square(), "sum", lengths=kept, unsafe=True, initial=0)
    return _sum_units(sums, unit_size)


def _sum_units(square_sums: Tensor, unit_size: int) -> Tensor:
    return square_sums if unit_size == 1 else square_sums.unflatten(-1, (-1, unit_size)).sum(-1)
