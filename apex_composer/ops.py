"""Who does a step's work: every operator by itself in plain torch, or several in one kernel.

The only file that imports the kernels.
"""

from collections.abc import Sequence
from typing import Protocol

from apex_composer.distributed import ShardRanks
from apex_composer.expansion import ExpansionOperator
from apex_composer.sharded_executor import ShardedExecutor
from apex_composer.shards import Shard, find_shards


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

    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""


def make_executors(operators: Sequence[ExpansionOperator]) -> list[Executor]:
    """Executors that together act for all operators.

    Operators of sharded weights share one executor for each group of ranks (collective then).

    Args:
        operators: of one stage, in the same order on all ranks.

    Raises:
        ValueError: for weights that are sharded in a way that cannot work.
    """
    shards = find_shards([operator.site for operator in operators])
    executors: list[Executor] = []
    sharded: dict[tuple, list[tuple[ExpansionOperator, list[Shard]]]] = {}
    for operator, own in zip(operators, shards, strict=True):
        if own[0].group is None:
            executors.append(operator)
        else:
            key = own[0].group, own[0].replicas, own[0].parameter.dtype
            sharded.setdefault(key, []).append((operator, own))
    for (group, replicas, _), pairs in sharded.items():
        executors.append(ShardedExecutor(*zip(*pairs, strict=True), ShardRanks(group, replicas)))
    return executors
