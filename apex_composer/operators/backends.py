"""Who does a step's work: every operator by itself, several in one kernel, or ranks together."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from apex_composer.distributed import ShardRanks
from apex_composer.model.sites import Site
from apex_composer.operators.operator import ExpansionOperator, as_matrix
from apex_composer.ops.dispatch import monarch_kernels, resolve, resolve_monarch
from apex_composer.ops.monarch import factor_pair
from apex_composer.sharding.sharded_backend import ShardedExecutor
from apex_composer.sharding.shards import Shard, find_shards


class Executor(Protocol):
    """Acts on the weights and gradients of one or several sites, for their operators.

    Attributes:
        folded: whether the parameters hold the effective weights, as they do outside of steps.
    """

    folded: bool

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P]."""

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P]."""

    def restore(self) -> None:
        """Fold after a failed step, by this rank alone."""

    def refresh(self) -> None:
        """The weights were changed since the fold: W_eff is what they hold now, T stays."""

    def parameters(self) -> list[nn.Parameter]:
        """Those that it writes."""

    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""

    def relative_norms(self) -> dict[str, float]:
        """|T W[P]| / |W_eff[N]| by site (waits for the device; collective where sharded)."""


def check_executors(
    sites: Sequence[Site],
    counts: Mapping[str, int],
    implementation: str,
    device: torch.device | None = None,
    *,
    expansion: bool = True,
) -> None:
    """Refuse what could only fail when a stage begins, and log what `auto` will take.

    Args:
        sites: that are expanded.
        counts: K of every site's group.
        implementation: `auto`, `torch` or `triton`.
        device: that the weights will be on; default where they are.
        expansion: False for stages without operators. Default True.

    Raises:
        ValueError: as `make_executors`.
    """
    for site, shards in zip(sites, find_shards(sites), strict=True):
        place = device or site.weight.device, site.weight.dtype
        resolve(implementation, *place)  # of the norms
        if expansion and shards[0].group is not None:
            check_sharded(implementation)
        elif expansion:
            size = counts[site.group.name] * site.group.unit_size
            resolve_monarch(implementation, *place, *factor_pair(size))


def check_sharded(implementation: str) -> None:
    """Raise ValueError where kernels are asked for and operators' weights are sharded."""
    if implementation == "triton":
        raise ValueError(
            "implementation: got triton, but the fold and the gradient map of sharded weights "
            "(FSDP) have no kernels. Allowed here: auto (kernels for the norms and SwiGLU), torch"
        )


def make_executors(
    operators: Sequence[ExpansionOperator], implementation: str = "auto"
) -> list[Executor]:
    """Executors that together act for all operators.

    Operators of sharded weights share one executor for each group of ranks (collective then).

    Args:
        operators: of one stage, in the same order on all ranks.
        implementation: `auto`, `torch` or `triton`. Default `auto`.

    Raises:
        ValueError: for weights that are sharded in a way that cannot work, and as
            `resolve_monarch`.
    """
    shards = find_shards([operator.site for operator in operators])
    whole: list[ExpansionOperator] = []
    sharded: dict[tuple, list[tuple[ExpansionOperator, list[Shard]]]] = {}
    for operator, own in zip(operators, shards, strict=True):
        if own[0].group is None:
            whole.append(operator)
        else:
            key = own[0].group, own[0].replicas, own[0].parameter.dtype
            sharded.setdefault(key, []).append((operator, own))
    if sharded:
        check_sharded(implementation)
    return _whole_executors(whole, implementation) + [
        ShardedExecutor(*zip(*pairs, strict=True), ShardRanks(group, replicas))
        for (group, replicas, _), pairs in sharded.items()
    ]


def _whole_executors(operators: Sequence[ExpansionOperator], implementation: str) -> list[Executor]:
    alone: list[Executor] = []
    groups: dict[tuple, list[ExpansionOperator]] = {}
    for operator in operators:
        weight, (p, q) = operator.site.weight, operator.factors.right.shape[:2]
        if resolve_monarch(implementation, weight.device, weight.dtype, p, q) == "torch":
            alone.append(operator)
            continue
        parameters = operator.site.parameters()
        layout = tuple((parameter.shape, parameter.stride()) for parameter in parameters)
        key = (layout, operator.site.axis, len(operator.advantageous))
        groups.setdefault(key, []).append(operator)
    return alone + [KernelExecutor(group) for group in groups.values()]


class KernelExecutor:
    """The operators of all weights of one shape, each step of theirs in two or three launches.

    Equals what the operators do one by one (`expansion.ExpansionOperator`, the reference). D = T
    W[P] is computed again to unfold: W[P] is unchanged since the fold, so it has the same bits.

    Args:
        operators: of weights alike in shape, strides, axis and n.
    """

    def __init__(self, operators: Sequence[ExpansionOperator]):
        self.folded = True
        self._operators = operators
        self._parameters = list(zip(*(o.site.parameters() for o in operators), strict=True))
        # The parameter itself: its memory may be replaced, and is looked up at every call. A bias
        # is seen as a matrix, see `_look_up`.
        self._matrices = [
            [p if p.dim() == 2 else as_matrix(p) for p in parameters]
            for parameters in self._parameters
        ]
        self._batches = [
            monarch_kernels()(
                matrices,
                [o.factors.left for o in operators],
                [o.factors.right for o in operators],
                [o.advantageous for o in operators],
                [o.disadvantageous for o in operators],
                axis=operators[0].site.axis,
            )
            for matrices in self._matrices
        ]

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P] for every weight, and bias."""
        self._look_up()
        for batch in self._batches:
            batch.fold(+1)
        self.folded = True

    restore = fold

    def refresh(self) -> None:
        """Nothing is kept between a fold and an unfold."""

    def parameters(self) -> list[nn.Parameter]:
        """All weights, and biases."""
        return [parameter for parameters in self._parameters for parameter in parameters]

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P] for every weight, and bias."""
        self._look_up()
        for batch in self._batches:
            batch.fold(-1)
        self.folded = False

    def map_gradient(self) -> None:
        """As `ExpansionOperator.map_gradient`, for every weight, and bias."""
        for operator in self._operators:
            for factor in operator.factors:
                factor.grad = None
        self._look_up()
        for batch, parameters in zip(self._batches, self._parameters, strict=True):
            gradients = [p.grad if p.grad is None else as_matrix(p.grad) for p in parameters]
            for factors, *found in zip(
                (operator.factors for operator in self._operators),
                *batch.map_gradient(gradients),
                strict=True,
            ):
                for factor, part in zip(factors, found, strict=True):
                    if part is not None:
                        factor.grad = part if factor.grad is None else factor.grad + part

    def _look_up(self) -> None:
        """Let the matrices that biases are seen as follow them to where they lie now."""
        for parameters, matrices in zip(self._parameters, self._matrices, strict=True):
            for parameter, matrix in zip(parameters, matrices, strict=True):
                if matrix.data_ptr() != parameter.data_ptr():
                    matrix.data = as_matrix(parameter)

    def relative_norms(self) -> dict[str, float]:
        """As `ExpansionOperator.relative_norms`, of all sites."""
        return {name: x for o in self._operators for name, x in o.relative_norms().items()}
