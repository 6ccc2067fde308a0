"""Scores of units from the activations of ordinary forward passes (paper eq. 3).

Shape legend
    B  samples of one microbatch: rows, or the sequences of packed rows    U  units of a group
    A cohort is the list of a model's groups of one kind and size: their norms are ranked together.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from apex_composer.assessment.scores import Counts, GroupTotals, add_counts, count_samples
from apex_composer.distributed import global_rank, sum_over_ranks
from apex_composer.model.sites import Group
from apex_composer.ops.dispatch import unit_square_sums
from apex_composer.ops.packed_samples import PackedSamples, find_samples
from apex_composer.ops.reference import packed_square_sums
from apex_composer.stopwatch import Stopwatch

log = logging.getLogger(__name__)

# Norms that wait to be ranked together. Ranks take dozens of small launches, which for a few
# samples at a time cost more than the norms themselves; all of a step's are 32 MB (TinyLLaMA-1.1B,
# 64 samples).
_MOST_UNRANKED_BYTES = 64 * 2**20


@lru_cache
def _say_packed(implementation: str) -> None:
    if implementation != "torch":
        log.info("apex: norms of packed rows by torch, because there is no kernel for them")


@dataclass
class _Cohort:
    groups: list[Group]
    count: int  # K
    square_sums: Tensor | None = None  # [groups, B, U] of the present forward pass
    filled: set[int] = field(default_factory=set)  # indices of the groups that it holds
    ahead: set[int] = field(default_factory=set)  # filled by a kernel before the hook is called
    # square_sums of forward passes, each with valid [B] (None: all samples count)
    unranked: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    pending: Counts | None = None
    committed: Counts | None = None


class Assessment:
    """Collects scores through forward pre-hooks on the projections that read the units.

    A forward pass counts when it runs between `open()` and `close()`; its counts become part of
    the scores at `commit()` and are forgotten at `discard()`. Recomputed forwards of activation
    checkpointing, which run inside a backward pass, never count.

    Args:
        groups: query heads and channels, with the K of each group: how many units are ranked as
            the largest and as the smallest.
        stopwatch: clock that counts the time spent; default one that nobody reads.
        implementation: kernels or torch for the norms, see `ops.dispatch.resolve`. Default `auto`.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Group, int]],
        stopwatch: Stopwatch | None = None,
        implementation: str = "auto",
    ):
        self._stopwatch, self._implementation = stopwatch or Stopwatch(), implementation
        self._index: dict[str, tuple[_Cohort, int]] = {}  # of every group, in its cohort
        self._handles = []
        self._mask: Tensor | None = None
        self._packed: PackedSamples | None = None
        self._open = self._full = False
        cohorts: dict[tuple, _Cohort] = {}
        for group, count in groups:
            key = (group.unit, group.units, group.unit_size, count)
            cohort = cohorts.setdefault(key, _Cohort([], count))
            self._index[group.name] = cohort, len(cohort.groups)
            cohort.groups.append(group)
            hook = self._hook(*self._index[group.name])
            self._handles.append(group.probe.register_forward_pre_hook(hook))
        self._cohorts = list(cohorts.values())

    def _hook(self, cohort: _Cohort, index: int):
        @torch.compiler.disable
        def collect(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module is not cohort.groups[index].probe:
                return  # a deep copy of the model has the hook too, and is another model
            if index in cohort.ahead:
                cohort.ahead.remove(index)
            elif self._counts_now():
                activation = inputs[0].detach()
                with self._stopwatch.block(activation.device):
                    self._collect(cohort, index, activation)

        collect.owner = self, cohort.groups[index].probe
        return collect

    def _collect(self, cohort: _Cohort, index: int, activation: Tensor) -> None:
        unit_size = cohort.groups[index].unit_size
        if self._packed is not None:
            out = self._reserve(cohort, index, len(self._packed.lengths), activation)
            out.copy_(packed_square_sums(activation, unit_size, self._packed))
            return
        # Without a sample axis even a full mask is needed, to tell the samples apart.
        mask = None if self._full and activation.dim() == 3 else self._mask
        samples = activation.shape[0] if activation.dim() == 3 or mask is None else len(mask)
        out = self._reserve(cohort, index, samples, activation)
        unit_square_sums(activation, unit_size, mask, out=out, implementation=self._implementation)

    def _counts_now(self) -> bool:
        # -1: not inside a backward pass, so not a recomputation. The only way torch offers.
        return self._open and torch._C._current_graph_task_id() == -1

    def _reserve(self, cohort: _Cohort, index: int, samples: int, activation: Tensor) -> Tensor:
        """Where a group's norms of this forward pass go: [samples, U]."""
        if index in cohort.filled:  # the next microbatch inside one open()
            self._end_pass()
        if not cohort.filled:
            shape = (len(cohort.groups), samples, cohort.groups[0].units)
            dtype = torch.promote_types(activation.dtype, torch.float32)
            cohort.square_sums = torch.empty(shape, dtype=dtype, device=activation.device)
        cohort.filled.add(index)
        return cohort.square_sums[index]

    def reserve_norms(self, group: str, activation: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Where a kernel that computes a group's activation puts the sums of squares as well.

        Args:
            group: name of the group whose activation is about to be computed.
            activation: any tensor of its shape and dtype, [samples, tokens, U * unit_size].

        Returns:
            [samples, U] to be filled and the mask (None: all tokens count), or None where this
            forward pass does not count, or its rows are packed.
        """
        fits = activation.dim() == 3 and self._packed is None and group in self._index
        if not self._counts_now() or not fits:
            return None
        cohort, index = self._index[group]
        out = self._reserve(cohort, index, activation.shape[0], activation)
        cohort.ahead.add(index)
        return out, None if self._full else self._mask

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def open(
        self,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        *,
        full: bool = False,
    ) -> None:
        """Count the forward passes from here on.

        Args:
            attention_mask: [B, tokens], true (1) for tokens that count; None counts all.
            sequence_id: [B, tokens], where rows are packed: each sequence counts as a sample, see
                `packed_samples.find_samples`. None: a row is a sample.
            full: whether the mask is known to be true everywhere and need not be applied.
        """
        self._mask, self._full, self._open, self._packed = attention_mask, full, True, None
        if sequence_id is not None:
            self._packed = find_samples(sequence_id, attention_mask)
            _say_packed(self._implementation)

    def close(self) -> None:
        """Keep what the last forward pass left, and stop counting."""
        self._end_pass()
        self._mask, self._packed, self._open = None, None, False

    @contextmanager
    def assessing(
        self, attention_mask: Tensor | None = None, sequence_id: Tensor | None = None
    ) -> Iterator[None]:
        """Count and commit the forward passes inside the block; forget them if it raises."""
        self.open(attention_mask, sequence_id)
        try:
            yield
            self.close()
            self.commit()
        finally:
            self.discard()

    def _end_pass(self) -> None:
        """Put the norms of a whole forward pass with those that wait to be ranked."""
        valid = None if self._mask is None or self._full else self._mask.any(dim=1)
        valid = valid if self._packed is None else self._packed.valid
        for cohort in self._cohorts:
            if not cohort.filled:
                continue
            missing = [g.name for i, g in enumerate(cohort.groups) if i not in cohort.filled]
            if missing:
                raise RuntimeError(f"this forward pass did not reach {', '.join(missing)}")
            cohort.filled = set()
            cohort.unranked.append((cohort.square_sums, valid))
            if sum(norms.nbytes for norms, _ in cohort.unranked) >= _MOST_UNRANKED_BYTES:
                self._rank(cohort)

    def _rank(self, cohort: _Cohort) -> None:
        if cohort.unranked:
            with self._stopwatch.block(cohort.groups[0].probe.weight.device):
                counts = _counts_of(cohort.unranked, cohort.count)
                cohort.pending = add_counts(cohort.pending, counts)
            cohort.unranked = []

    def commit(self) -> None:
        """Make the counts since the last commit part of the scores."""
        for cohort in self._cohorts:
            self._rank(cohort)
            cohort.committed = add_counts(cohort.committed, cohort.pending)
            cohort.pending = None

    def discard(self) -> None:
        """Forget the counts since the last commit (a batch that is tried again)."""
        self._mask, self._packed, self._open = None, None, False
        for cohort in self._cohorts:
            cohort.filled, cohort.ahead = set(), set()
            cohort.unranked, cohort.pending = [], None

    def reset(self) -> None:
        """Forget all scores."""
        self.discard()
        for cohort in self._cohorts:
            cohort.committed = None

    def totals(self) -> dict[str, GroupTotals]:
        """Scores, mean norms and samples of every group, summed over all ranks (collective).

        Returns:
            One entry per group, empty before anything was committed on any rank.
        """
        totals = {}
        for cohort in self._cohorts:
            scores, norm_sums, samples = _sum_over_ranks(cohort)
            if int(samples) > 0:
                for index, group in enumerate(cohort.groups):
                    totals[group.name] = GroupTotals(scores[index], norm_sums[index], int(samples))
        return totals

    def load_totals(self, totals: Mapping[str, Sequence]) -> None:
        """Go on from saved totals. In a distributed run rank 0 takes them over for all.

        Args:
            totals: what `totals()` gave, each a GroupTotals or a list of its three fields.
        """
        self.reset()
        if not totals or global_rank() != 0:
            return
        for cohort in self._cohorts:
            scores, norm_sums, samples = zip(*(totals[g.name] for g in cohort.groups), strict=True)
            device = cohort.groups[0].probe.weight.device
            cohort.committed = Counts(
                torch.stack(scores).to(device),
                torch.stack(norm_sums).to(device),
                torch.tensor(samples[0], device=device),
            )


@torch.inference_mode(False)  # its counts are added to in training, where that is off
@torch.no_grad()
def _counts_of(passes: Sequence[tuple[Tensor, Tensor | None]], count: int) -> Counts:
    """Counts of all samples of some forward passes."""
    square_sums = torch.cat([norms for norms, _ in passes], dim=1)
    if all(valid is None for _, valid in passes):
        return count_samples(square_sums, count, None)
    valid = [norms.new_ones(norms.shape[1], dtype=bool) if v is None else v for norms, v in passes]
    return count_samples(square_sums, count, torch.cat(valid))


def assessments(model: torch.nn.Module) -> list[Assessment]:
    """Those whose hooks are on a model; a deep copy's hooks belong to the original."""
    owners = [
        (module, *getattr(hook, "owner", (None, None)))
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    ]
    return [owner for module, owner, probe in owners if probe is module]


def _sum_over_ranks(cohort: _Cohort) -> Counts:
    """A copy of a cohort's committed counts, added up over the ranks."""
    shape = len(cohort.groups), cohort.groups[0].units
    device = cohort.groups[0].probe.weight.device
    nothing = Counts(
        torch.zeros(shape, dtype=torch.int64, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    summed = add_counts(nothing, cohort.committed)
    return Counts(*(sum_over_ranks(tensor) for tensor in summed))
