"""Counts of samples over the units of groups: scores and sums of norms (paper eq. 3).

Shape legend
    B  samples of one microbatch        U  units of a group
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apex_composer.assessment.scores import rank_counts


@dataclass
class Counts:
    """What the groups of one cohort have collected, and the samples behind it."""

    scores: Tensor  # [groups, U] int64
    norm_sums: Tensor  # [groups, U] float64, sum over samples of a_i(x)
    samples: Tensor  # [] int64

    def add(self, other: "Counts") -> None:
        """Count the other's samples too, in place."""
        self.scores += other.scores
        self.norm_sums += other.norm_sums
        self.samples += other.samples


@dataclass(frozen=True)
class GroupTotals:
    """A group's scores [U] int64, sums of norms [U] float64, and the samples they come from."""

    scores: Tensor
    norm_sums: Tensor
    samples: int

    def mean_norms(self) -> Tensor:
        """Mean over samples of a_i(x), [U], float64."""
        return self.norm_sums / max(self.samples, 1)

    def ranked_by(self, method: str) -> Tensor:
        """What units are selected by: scores (`rank`) or mean norms, [U]."""
        return self.scores if method == "rank" else self.mean_norms()


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
    return Counts(rank_counts(square_sums, count, valid), norms.sum(dim=1), samples)
