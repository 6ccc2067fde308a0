"""The executor of operators whose weights are sharded (FSDP1, FSDP2, HSDP), all sites at once.

    map_gradient   G[N] to the workers; dL and dR summed over the ranks; T^T G[N] back to P's owners
    unfold         nothing to communicate: every owner subtracts what it added
    fold           W[P] to the workers; D = T W[P] back to N's owners, who keep their part of it

That is 4 exchanges and 1 sum per step, however many sites there are; `routes.py` says who
works on what. W[P] stays the same between a fold and the next step, so the workers keep it.

Shape legend
    m   sites with operators of one size        n = p * q   rows that an operator maps
    d   the part of a weight's free axis that this rank works on
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops.monarch import MonarchFactors, add_gradients, multiply
from apex_composer.ops.reference import product_gradients
from apex_composer.sharding.ranks import ShardRanks
from apex_composer.sharding.routes import Matrix
from apex_composer.sharding.shards import Shard, reshard
from apex_composer.sharding.transport import Parts, Transport

_CHANGED = (
    "sharded weights were changed since the last step of this stage (load_state_dict, an in-place "
    "write), and T W[P] is still that of the weights before. Allowed: to take state = "
    "expander.state_dict() before the change and to call expander.load_state_dict(state) after it, "
    "on all ranks; or to change weights between stages, after expander.fuse()"
)


@dataclass(frozen=True, eq=False)
class _Job:
    """One sharded weight or bias, and its operator."""

    operator: ExpansionOperator
    shard: Shard
    bias: bool

    @property
    def axis(self) -> int:
        """Where the units lie; a bias is a matrix of one column."""
        return 0 if self.bias else self.operator.site.axis

    @property
    def kind(self) -> tuple[int, ...]:
        """Jobs of one kind can be computed in one go: they come one behind the other."""
        return self.axis, int(self.bias), len(self.operator.advantageous), self.shard.shape[1]

    def matrix(self, intervals: Sequence[tuple[int, int]]) -> Matrix:
        operator = self.operator
        sets = {"P": operator.advantageous.cpu(), "N": operator.disadvantageous.cpu()}
        return Matrix(self.shard.shape, self.axis, tuple(intervals), sets)


class ShardedExecutor:
    """Folds, unfolds and maps gradients of all sites that the same ranks share.

    All ranks construct it and call `fold`, `map_gradient` and `relative_norms` together.
    A weight without a gradient counts as one whose gradient is zero: whether other ranks have
    one is not known without waiting for them.

    Args:
        operators: those of one stage, in the same order on all ranks.
        shards: parts of every operator's weight and bias, see `find_shards`.
        ranks: those that share the weights.

    Attributes:
        folded: whether the parameters hold the effective weights, as they do outside of steps.
        operators: those given.
        transport: this rank's end of the exchanges.
    """

    def __init__(
        self,
        operators: Sequence[ExpansionOperator],
        shards: Sequence[Sequence[Shard]],
        ranks: ShardRanks,
    ):
        self.folded, self.operators, self._ranks = True, list(operators), ranks
        jobs = [
            _Job(operator, shard, place > 0)
            for operator, pair in zip(operators, shards, strict=True)
            for place, shard in enumerate(pair)
        ]
        self._jobs = sorted(jobs, key=lambda job: job.kind)
        intervals = ranks.gather([(job.shard.start, job.shard.stop) for job in self._jobs])
        matrices = [
            job.matrix(of_ranks)
            for job, of_ranks in zip(self._jobs, zip(*intervals, strict=True), strict=True)
        ]
        self.transport = Transport(matrices, ranks, self._jobs[0].shard.parameter.device)
        self._selected: list[Tensor] | None = None  # W[P] as this rank works on it, by family
        self._deltas: Parts | None = None  # what the last fold added to this rank's shards

    @torch.no_grad()
    def fold(self) -> None:
        """W[N] <- W[N] + T W[P]."""
        self._deltas = self._expand()
        self.transport.add("N", self._deltas, self._values())
        self.folded = True

    @torch.no_grad()
    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P], what the last fold added; a resumed run computes it first."""
        if self._deltas is None:
            self._deltas = self._expand()
        self.transport.add("N", self._deltas, self._values(), -1)
        self._selected = None  # the optimizer changes W[P] now
        self.folded = False

    @torch.no_grad()
    def restore(self) -> None:
        """Fold after a failed step, by this rank alone: add what was subtracted.

        Where a step has failed the other ranks may never come to an exchange. The next unfold
        subtracts the same again, so the base weight stays what the failed step left of it.
        """
        reshard([operator.site for operator in self.operators])
        self.transport.add("N", self._deltas, self._values())
        self.folded = True

    def refresh(self) -> None:
        """Refuse weights that were changed since the fold.

        W[P] would have to be gathered anew, by all ranks together, and those that hold other parts
        of the weights may have seen no change.

        Raises:
            RuntimeError: saying how to change weights in the middle of a stage.
        """
        raise RuntimeError(_CHANGED)

    def parameters(self) -> list[nn.Parameter]:
        """The sharded weights, and biases."""
        return [job.shard.parameter for job in self._jobs]

    @torch.no_grad()
    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""
        gradients = [job.shard.gradient() for job in self._jobs]
        given = [
            torch.zeros_like(job.shard.values()) if gradient is None else gradient
            for job, gradient in zip(self._jobs, gradients, strict=True)
        ]
        selected, received = self._gather_selected(), self.transport.to_workers("N", given)
        for factor in self._all_factors():
            factor.grad = None
        additions = []
        for family, x, g in zip(self.transport.families, selected, received, strict=True):
            shares, addition = product_gradients(self._factors(family), x, g)
            additions.append(addition)
            for i, *share in zip(family, *shares, strict=True):
                add_gradients(self._jobs[i].operator.factors, share)
        self._sum_shares()
        self.transport.add("P", self.transport.to_owners("P", additions), gradients)

    @torch.no_grad()
    def relative_norms(self) -> dict[str, float]:
        """|T W[P]| / |W_eff[N]| by site (collective, waits for the device)."""
        if self._deltas is None:
            self._deltas = self._expand()
        parts = self._deltas, self.transport.take("N", self._values())
        squares = torch.stack([self.transport.square_sums("N", part) for part in parts])
        delta, target = self._ranks.sum(squares).sqrt().tolist()
        return {
            job.operator.site.name: delta[i] / max(target[i], 1e-30)
            for i, job in enumerate(self._jobs)
            if not job.bias
        }

    def _values(self) -> list[Tensor]:
        return [job.shard.values() for job in self._jobs]

    def _gather_selected(self) -> list[Tensor]:
        """W[P] of every family, kept since the last fold or gathered now."""
        if self._selected is None:
            self._selected = self.transport.to_workers("P", self._values())
        return self._selected

    def _expand(self) -> Parts:
        """This rank's part of D = T W[P] (collective)."""
        selected = self._gather_selected()
        deltas = [
            multiply(self._factors(family), x)
            for family, x in zip(self.transport.families, selected, strict=True)
        ]
        return self.transport.to_owners("N", deltas)

    def _factors(self, family: Sequence[int]) -> MonarchFactors:
        factors = [self._jobs[i].operator.factors for i in family]
        return MonarchFactors(*(torch.stack(side) for side in zip(*factors, strict=True)))

    def _all_factors(self) -> list[Tensor]:
        return [factor for operator in self.operators for factor in operator.factors]

    def _sum_shares(self) -> None:
        """Add the ranks' shares of all factors' gradients up, in one flat buffer."""
        factors = self._all_factors()
        total = self._ranks.sum(torch.cat([factor.grad.flatten() for factor in factors]))
        for factor, own in zip(factors, total.split([f.numel() for f in factors]), strict=True):
            factor.grad = own.view_as(factor)
