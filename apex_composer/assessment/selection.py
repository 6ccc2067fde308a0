"""From scores to the advantageous and the disadvantageous units of each group (paper eq. 4-6)."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apex_composer.distributed import check_same_on_all_ranks
from apex_composer.model.sites import Group, Site
from apex_composer.ops.monarch import has_factor_pair


class Selection(NamedTuple):
    """Units of one group: [K] ascending int64 each, disjoint."""

    advantageous: Tensor
    disadvantageous: Tensor


def seeded_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose numbers depend on the seed and the names alone, on every rank."""
    text = "/".join(str(part) for part in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def count_selected(group: Group, threshold: float, *, at_least_one: bool = True) -> int:
    """K, the units of a group on each side: round(threshold * units), at least 1 (paper eq. 3).

    Halves round up. K is then lowered to where K * unit_size has a Monarch factor pair, so for
    1408 channels at 12.5 % it is 176, for 1376 it is 171 (9 x 19) instead of 172 (4 x 43); and
    to units / 2, so that both sides are disjoint. All three are our choices.

    Args:
        group: query heads, KV heads or channels of a layer.
        threshold: share of the units on each side, in (0, 0.5].
        at_least_one: False leaves K at 0 where threshold * units < 1 (KV heads).
    """
    share = threshold * group.units
    count = math.floor(share + 0.5) if share >= 1 else int(at_least_one)
    count = min(count, group.units // 2)
    while count > 0 and not has_factor_pair(count * group.unit_size):
        count -= 1
    return count


def select(scores: Tensor, count: int) -> Selection:
    """The `count` units with the highest score and the `count` with the lowest.

    Ties go to the lower index; the advantageous units are taken first, the disadvantageous ones
    from the rest, so that both are disjoint even where all scores are equal. Both are our choice.

    Args:
        scores: [U], any dtype.
        count: K, at most U / 2.
    """
    advantageous = torch.sort(scores, descending=True, stable=True).indices[:count]
    ascending = torch.sort(scores, stable=True).indices
    rest = ascending[~torch.isin(ascending, advantageous)]
    return Selection(advantageous.sort().values, rest[:count].sort().values)


def select_random(group: Group, count: int, seed: int, stage: int) -> Selection:
    """Units drawn without any assessment (the paper's ablation)."""
    generator = seeded_generator(seed, "selection", stage, group.name)
    order = torch.randperm(group.units, generator=generator)
    return Selection(order[:count].sort().values, order[count : 2 * count].sort().values)


def count_by_group(sites: Sequence[Site], threshold: float, kv_heads: str) -> dict[str, int]:
    """K of every group that is expanded; groups that are left alone are missing."""
    counts = {}
    for group in {site.group.name: site.group for site in sites}.values():
        if group.unit == "kv_head" and kv_heads == "skip":
            continue
        # Without grouping a KV head is a query head's own, and follows the rule of heads.
        grouped = group.unit == "kv_head" and group.units < group.assessed_by.units
        forced = not grouped or kv_heads == "expand"
        count = count_selected(group, threshold, at_least_one=forced)
        if count == 0 and forced:
            raise ValueError(
                f"threshold: {threshold} of the {group.units} units of {group.name} rounds to a "
                "selection of nothing (two units at least are needed, one on each side): raise "
                "the threshold, or leave such groups out with `targets` or `kv_heads: skip`"
            )
        if count:
            counts[group.name] = count
    return counts


def select_groups(
    groups: Sequence[Group],
    counts: Mapping[str, int],
    values: Mapping[str, Tensor] | None,
    seed: int,
    stage: int,
) -> dict[str, Selection]:
    """The selection of every group on the CPU, compared between the ranks (collective).

    A KV head's score is the sum of its query heads' (our choice, the paper is silent).

    Args:
        groups: those to select units of.
        counts: K of every group, by name.
        values: numbers that the assessed groups' units are ranked by, [U] by name; None selects
            at random.
        seed: the run's, for random selections.
        stage: number of the stage, for random selections.

    Raises:
        RuntimeError: where the ranks differ.
    """
    selections = {}
    for group in groups:
        count = counts[group.name]
        if values is None:
            selections[group.name] = select_random(group, count, seed, stage)
            continue
        own = values[(group.assessed_by or group).name].view(group.units, -1).sum(1)
        selections[group.name] = Selection(*(t.cpu() for t in select(own, count)))
    selected = {name: [t.tolist() for t in sets] for name, sets in selections.items()}
    check_same_on_all_ranks(f"the selection of stage {stage}", [seed, stage, selected])
    return selections
