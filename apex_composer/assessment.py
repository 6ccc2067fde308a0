"""Scores of units from the activations of ordinary forward passes (method.md 1, paper eq. 3-6).

Shape legend
    B  samples of one microbatch        U  units of a group
    A cohort is the list of a model's groups of one kind and size: their norms are ranked together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from apex_composer.distributed import global_rank, sum_over_ranks
from apex_composer.reference import unit_square_sums
from apex_composer.sites import Group
from apex_composer.stopwatch import Stopwatch

Method = Literal["rank", "average", "random"]
METHODS = ("rank", "average", "random")


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


@dataclass
class _Counts:
    """What one cohort has collected: over its groups and units, and the samples behind it."""

    scores: Tensor  # [groups, U] int64
    norm_sums: Tensor  # [groups, U] float64, sum over samples of a_i(x)
    samples: Tensor  # [] int64

    def add(self, other: "_Counts") -> None:
        self.scores += other.scores
        self.norm_sums += other.norm_sums
        self.samples += other.samples


@dataclass
class _Cohort:
    groups: list[Group]
    count: int  # K
    square_sums: dict[int, Tensor] = field(default_factory=dict)  # group's place -> [B, U]
    pending: _Counts | None = None
    committed: _Counts | None = None


class Assessment:
    """Collects scores through forward pre-hooks on the projections that read the units.

    A forward pass counts when it runs between `open()` and `close()`; its counts become part of
    the scores at `commit()` and are forgotten at `discard()`. Recomputed forwards of activation
    checkpointing, which run inside a backward pass, never count.

    Args:
        groups: of query heads and channels, with the K of each: how many units are ranked as
            the largest and as the smallest.
        stopwatch: counts the time spent; default one that nobody reads.
    """

    def __init__(self, groups: Sequence[tuple[Group, int]], stopwatch: Stopwatch | None = None):
        self._stopwatch = stopwatch or Stopwatch()
        self._cohorts: dict[tuple, _Cohort] = {}
        self._places: dict[str, tuple[_Cohort, int]] = {}
        self._mask: Tensor | None = None
        self._open = self._full = False
        for group, count in groups:
            key = (group.unit, group.units, group.unit_size, count)
            cohort = self._cohorts.setdefault(key, _Cohort([], count))
            self._places[group.name] = (cohort, len(cohort.groups))
            cohort.groups.append(group)
        self._handles = [
            group.probe.register_forward_pre_hook(self._hook(*self._places[group.name]))
            for group, _ in groups
        ]

    def _hook(self, cohort: _Cohort, place: int):
        unit_size = cohort.groups[place].unit_size

        def collect(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # -1: not inside a backward pass, so not a recomputation. The only way torch offers.
            if not self._open or torch._C._current_graph_task_id() != -1:
                return
            if place in cohort.square_sums:  # the next microbatch inside one open()
                self._rank()
            activation = inputs[0].detach()
            # Without a sample axis even a full mask is needed, to tell the samples apart.
            mask = None if self._full and activation.dim() == 3 else self._mask
            with self._stopwatch.block(activation.device):
                cohort.square_sums[place] = unit_square_sums(activation, unit_size, mask)

        return collect

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def open(self, attention_mask: Tensor | None = None, *, full: bool = False) -> None:
        """Count the forward passes from here on.

        Args:
            attention_mask: [B, tokens], true (1) for tokens that count; None counts all.
            full: the mask is known to be true everywhere, so that it need not be applied.
        """
        self._mask, self._full, self._open = attention_mask, full, True

    def close(self) -> None:
        """Rank what the last forward pass left, and stop counting."""
        device = next(iter(self._cohorts.values())).groups[0].probe.weight.device
        with self._stopwatch.block(device):
            self._rank()
        self._mask, self._open = None, False

    @contextmanager
    def assessing(self, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Count and commit the forward passes inside the block; forget them if it raises."""
        self.open(attention_mask)
        try:
            yield
            self.close()
            self.commit()
        finally:
            self.discard()

    @torch.no_grad()
    def _rank(self) -> None:
        valid = None if self._mask is None or self._full else self._mask.any(dim=1)
        for cohort in self._cohorts.values():
            if not cohort.square_sums:
                continue
            if len(cohort.square_sums) != len(cohort.groups):
                missing = [
                    g.name for i, g in enumerate(cohort.groups) if i not in cohort.square_sums
                ]
                raise RuntimeError(f"this forward pass did not reach {', '.join(missing)}")
            stacked = torch.stack([cohort.square_sums[i] for i in range(len(cohort.groups))])
            cohort.square_sums = {}
            counts = _count(stacked, cohort.count, valid)
            if cohort.pending is None:
                cohort.pending = counts
            else:
                cohort.pending.add(counts)

    def commit(self) -> None:
        """Make the counts since the last commit part of the scores."""
        for cohort in self._cohorts.values():
            if cohort.pending is not None and cohort.committed is not None:
                cohort.committed.add(cohort.pending)
            elif cohort.pending is not None:
                cohort.committed = cohort.pending
            cohort.pending = None

    def discard(self) -> None:
        """Forget the counts since the last commit (a batch that is tried again)."""
        self._mask, self._open = None, False
        for cohort in self._cohorts.values():
            cohort.square_sums, cohort.pending = {}, None

    def reset(self) -> None:
        """Forget all scores."""
        self.discard()
        for cohort in self._cohorts.values():
            cohort.committed = None

    def totals(self) -> "dict[str, GroupTotals]":
        """Scores, mean norms and samples of every group, summed over all ranks (collective).

        Returns:
            One entry per group, empty before anything was committed on any rank.
        """
        totals = {}
        for cohort in self._cohorts.values():
            summed = _sum_over_ranks(cohort)
            if summed is None:
                continue
            for group, scores, norm_sums in zip(
                cohort.groups, summed.scores, summed.norm_sums, strict=True
            ):
                totals[group.name] = GroupTotals(scores, norm_sums, int(summed.samples))
        return totals

    def load_totals(self, totals: "dict[str, GroupTotals]") -> None:
        """Go on from saved totals. In a distributed run rank 0 takes them over for all."""
        self.reset()
        if not totals or global_rank() != 0:
            return
        for cohort in self._cohorts.values():
            own = [totals[group.name] for group in cohort.groups]
            device = cohort.groups[0].probe.weight.device
            cohort.committed = _Counts(
                torch.stack([t.scores for t in own]).to(device),
                torch.stack([t.norm_sums for t in own]).to(device),
                torch.tensor(own[0].samples, device=device),
            )


@dataclass(frozen=True)
class GroupTotals:
    """A group's scores [U] int64, sums of norms [U] float64, and the samples they come from."""

    scores: Tensor
    norm_sums: Tensor
    samples: int

    def mean_norms(self) -> Tensor:
        """Mean over samples of a_i(x), [U], float64."""
        return self.norm_sums / max(self.samples, 1)


def _count(square_sums: Tensor, count: int, valid: Tensor | None) -> _Counts:
    """Counts of one microbatch from [groups, B, U]; ranks need no square root, sums do."""
    norms = square_sums.sqrt().to(torch.float64)
    # full() writes on the device; tensor() would copy from the host and wait.
    samples = torch.full((), norms.shape[1], dtype=torch.int64, device=norms.device)
    if valid is not None:
        norms, samples = norms * valid.unsqueeze(-1), valid.sum()
    return _Counts(rank_counts(square_sums, count, valid), norms.sum(dim=1), samples)


def _sum_over_ranks(cohort: _Cohort) -> _Counts | None:
    """A copy of a cohort's committed counts, added up over the ranks."""
    own = cohort.committed
    group = cohort.groups[0]
    shape, device = (len(cohort.groups), group.units), group.probe.weight.device
    summed = _Counts(
        torch.zeros(shape, dtype=torch.int64, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    if own is not None:
        summed.add(own)
    for tensor in (summed.scores, summed.norm_sums, summed.samples):
        sum_over_ranks(tensor)
    return summed if int(summed.samples) > 0 else None
