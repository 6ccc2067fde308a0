"""How many parameters are trained, and the threshold with which a share of them is met."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from apex_composer.assessment.selection import count_by_group
from apex_composer.model.sites import Group, Site
from apex_composer.ops.monarch import factor_pair
from apex_composer.settings import SIDES

# A share that is met from below by less than this part of it is refused: units are coarse.
NEAR_ENOUGH = 0.9


@dataclass(frozen=True)
class Share:
    """What is trained, in numbers.

    Attributes:
        threshold: share of units on each side.
        counts: K of the groups that are selected from, by name.
        filled: how many units of every group are drawn from the others (`half`).
        trained: trained parameters, operators included.
        total: parameters of the model.
    """

    threshold: float
    counts: dict[str, int]
    filled: dict[str, int]
    trained: int
    total: int

    def describe(self) -> str:
        """For the log: `trained 158,859,264 of 6,738,415,616 parameters (2.358 %)`."""
        return (
            f"trained {self.trained:,} of {self.total:,} parameters "
            f"({self.trained / self.total:.3%}), threshold {self.threshold:.6g}"
        )


class _Request(NamedTuple):
    """A mode of training, and the sites that it is for."""

    trainable: str
    expansion: bool
    sites: Sequence[Site]
    kv_heads: str
    whole: int  # parameters that are trained as they are
    total: int

    def count(self, threshold: float, part: float = 0.0) -> Share:
        """With a part of the units that are not selected drawn from them."""
        counts = count_by_group(self.sites, threshold, self.kv_heads) if threshold else {}
        sides = SIDES[self.trainable]
        groups = {site.group.name: site.group for site in self.sites}.values()
        rest = {group.name: _rest(group, counts) for group in groups}
        filled = {name: int(part * units + 1e-9) for name, units in rest.items() if part}
        trained = self.whole
        for site in self.sites:
            count, size = counts.get(site.group.name, 0), site.group.unit_size
            units = sides * count + filled.get(site.group.name, 0)
            trained += units * size * _width(site)
            if count and self.expansion and self.trainable != "disadvantageous":
                trained += count * size * sum(factor_pair(count * size))
        return Share(threshold, counts, filled, trained, self.total)


def share_of(
    trainable: str,
    sites: Sequence[Site],
    kv_heads: str,
    threshold: float,
    share: float | None,
    whole: Iterable[nn.Parameter] = (),
    expansion: bool = True,
) -> Share:
    """What a run trains; with a share the nearest to it from below.

    Args:
        trainable: `selected`, `disadvantageous` or `half`.
        sites: all of the model whose units can be trained.
        kv_heads: as of `Expander`.
        threshold: share of units on each side; solved for where a share is given, but for `half`,
            whose other units are then drawn at random.
        share: trained parameters over all. None: what the threshold gives.
        whole: parameters that are trained as they are.
        expansion: False for a run without operators. Default True.

    Raises:
        ValueError: a share that cannot be met within 10 %, naming the nearest that can.
    """
    model = sites[0].model
    total = sum(parameter.shape.numel() for parameter in model.parameters())
    trained = sum(parameter.shape.numel() for parameter in whole)
    request = _Request(trainable, expansion, sites, kv_heads, trained, total)
    if share is None:
        return request.count(threshold)
    groups = {site.group.name: site.group for site in sites}.values()
    if trainable == "half":
        counts = request.count(threshold).counts
        rests = {_rest(group, counts) for group in groups}
        steps = {n / rest for rest in rests if rest for n in range(rest + 1)}
        found = _search(lambda part: request.count(threshold, part), steps, share)
    else:
        sizes = {group.units for group in groups}
        steps = {(n + 0.5) / units for units in sizes for n in range(1, units // 2)} | {0.5}
        found = _search(request.count, steps | {min(0.5, 1 / max(sizes))}, share)
    return found


def _search(count: Callable[[float], Share], steps: Iterable[float], share: float) -> Share:
    """The largest step whose count is not above the share."""
    steps = sorted(steps)
    place = bisect_right(steps, share, key=lambda step: count(step).trained / count(step).total)
    nearest = [count(step) for step in steps[max(place - 1, 0) : place + 1]]
    if place == 0 or nearest[0].trained < NEAR_ENOUGH * share * nearest[0].total:
        # Rounded up, so that what is named can be given.
        shares = [math.ceil(1e5 * found.trained / found.total) / 1e5 for found in nearest]
        near = " and ".join(map(str, shares))
        raise ValueError(
            f"trainable_share: got {share}, which cannot be met within 10 % from below: units are "
            f"trained as a whole, and the nearest shares are {near}. Give one of these"
        )
    return nearest[0]


def _rest(group: Group, counts: Mapping[str, int]) -> int:
    return group.units - 2 * counts.get(group.name, 0)


def _width(site: Site) -> int:
    """Parameters at one index of the axis: a row, and its bias."""
    return site.weight.shape[1 - site.axis] + len(site.parameters()) - 1
