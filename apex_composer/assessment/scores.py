"""Scores of units: ranks within their groups, counted over samples (paper eq. 3).

Shape legend
    B  samples of one microbatch        U  units of a group
"""

from typing import NamedTuple

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
    free = count - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= free))


def rank_scores(norms: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
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


class Counts(NamedTuple):
    """What several groups of one size have collected, and the samples behind it."""

    scores: Tensor  # [groups, U] int64
    norm_sums: Tensor  # [groups, U] float64, sum over samples of a_i(x)
    samples: Tensor  # [] int64


def count_samples(square_sums: Tensor, count: int, valid: Tensor | None) -> Counts:
    """Counts of one microbatch; ranks need no square root, sums do.

    Args:
        square_sums: a_i(x)^2, [groups, B, U].
        count: K.
        valid: [B] bool, false for samples that do not count (padding only); None counts all.
    """
    norms = square_sums.sqrt().to(torch.float64)
    # full() writes on the device; tensor() would copy from the host and wait.
    samples = torch.full((), norms.shape[1], dtype=torch.int64, device=norms.device)
    if valid is not None:
        norms, samples = norms * valid.unsqueeze(-1), valid.sum()
    return Counts(rank_scores(square_sums, count, valid), norms.sum(dim=1), samples)


def add_counts(total: Counts | None, more: Counts | None) -> Counts | None:
    """Counts of the samples of both; None where neither has any."""
    if total is None or more is None:
        return total or more
    return Counts(*(own + other for own, other in zip(total, more, strict=True)))


class GroupTotals(NamedTuple):
    """What one group has collected on all ranks, and the samples behind it."""

    scores: Tensor  # [U] int64
    norm_sums: Tensor  # [U] float64
    samples: int

    def mean_norms(self) -> Tensor:
        """Mean over samples of a_i(x), [U], float64."""
        return self.norm_sums / max(self.samples, 1)

    def ranked_by(self, method: str) -> Tensor:
        """What units are selected by: scores (`rank`) or mean norms, [U]."""
        return self.scores if method == "rank" else self.mean_norms()
