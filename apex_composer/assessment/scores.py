"""Ranks of units within their groups: who is among the largest and the smallest (paper eq. 3)."""

import torch
from torch import Tensor


def indicator_of_largest(values: Tensor, count: int) -> Tensor:
    """[x is among the `count` largest of its row], ties going to the lower index.

    topk alone leaves open which of several equal values it returns (dead channels are equal:
    zero), so the tie at the boundary is settled here.

    Args:
        values: [..., U].
        count: K, 1 <= K <= U.

    Returns:
        [..., U], bool, exactly `count` true in every row.
    """
    boundary = values.topk(count, dim=-1).values[..., -1:]
    above = values > boundary
    tied = values == boundary
    free = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= free))


def rank_counts(norms: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Sum over samples of [a_i in the K largest] - [a_i in the K smallest] (paper eq. 3).

    Args:
        norms: a_i(x) or any increasing function of it, [..., B, U].
        count: K.
        valid: [B], false for samples that do not count (padding only); None counts all.

    Returns:
        [..., U], int64.
    """
    largest = indicator_of_largest(norms, count).to(torch.int8)
    smallest = indicator_of_largest(-norms, count).to(torch.int8)
    difference = largest - smallest
    if valid is not None:
        difference = difference * valid.to(torch.int8).unsqueeze(-1)
    return difference.sum(dim=-2, dtype=torch.int64)
