"""Which executors act for the operators of a stage, by how their weights are held."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from apex_composer.model.sites import Site
from apex_composer.operators.executors import Executor, whole_executors
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops.dispatch import resolve, resolve_monarch
from apex_composer.ops.monarch import factor_pair
from apex_composer.sharding.ranks import ShardRanks
from apex_composer.sharding.sharded_executor import ShardedExecutor
from apex_composer.sharding.shards import Shard, find_shards


def check_executors(
    sites: Sequence[Site],
    counts: Mapping[str, int],
    implementation: str,
    device: torch.device | None = None,
    *,
    expansion: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse what could only fail when a stage begins, and log what `auto` will take.

    Args:
        sites: those that are expanded.
        counts: K of every site's group.
        implementation: `auto`, `torch` or `triton`.
        device: the one that the weights will be on; default where they are.
        expansion: False for stages without operators. Default True.
        dtype: the one in which operators act on the weights; default the weights'.

    Raises:
        ValueError: as `make_executors`.
    """
    for site, shards in zip(sites, find_shards(sites), strict=True):
        place = device or site.weight.device, dtype or site.weight.dtype
        resolve(implementation, *place)  # of the norms
        if expansion and shards[0].process_group is not None:
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
    operators: Sequence[ExpansionOperator],
    implementation: str = "auto",
    shards: Sequence[Sequence[Shard]] | None = None,
) -> list[Executor]:
    """Executors that together act for all operators.

    Operators of sharded weights have one executor for all of them (collective then).

    Args:
        operators: those of one stage, in the same order on all ranks.
        implementation: `auto`, `torch` or `triton`. Default `auto`.
        shards: what this rank holds of every operator's weight and bias; default looked up.

    Raises:
        ValueError: for weights that are sharded in a way that cannot work, and as
            `resolve_monarch`.
    """
    whole: list[ExpansionOperator] = []
    sharded: dict[tuple, list[tuple[ExpansionOperator, list[Shard]]]] = defaultdict(list)
    if shards is None:
        shards = find_shards([operator.site for operator in operators])
    for operator, own in zip(operators, shards, strict=True):
        first = own[0]
        if first.process_group is None:
            whole.append(operator)
        else:
            ranks = first.process_group, first.replicas
            sharded[ranks, first.parameter.dtype].append((operator, own))
    if sharded:
        check_sharded(implementation)
    return whole_executors(whole, implementation) + [
        ShardedExecutor(*zip(*pairs, strict=True), ShardRanks(*ranks))
        for (ranks, _), pairs in sharded.items()
    ]
