"""Scores of eq. 3 counted by hooks and loops of their own, and models to count them on.

In float64: the same samples in other batches give other roundings, and in float32 one of them can
change a rank where two norms are next to equal.
"""

from functools import partial

import helpers
import pytest
import torch
from helpers import largest

from apex_composer import find_sites
from apex_composer.assessment.collector import Assessment
from apex_composer.assessment.scores import GroupTotals

tiny_llama = partial(helpers.tiny_llama, dtype=torch.float64)
COUNTS = {"head": 1, "channel": 6}  # threshold 0.25 of 4 heads and 24 channels


def assessed_groups(model) -> list:
    """Query heads and channels of every layer, with their K."""
    groups = {s.group.name: s.group for s in find_sites(model) if s.group.unit in COUNTS}
    return [(group, COUNTS[group.unit]) for group in groups.values()]


def make_assessment(model) -> Assessment:
    return Assessment(assessed_groups(model))


class ByHand:
    """Scores of eq. 3 by hooks and loops of its own."""

    def __init__(self, model):
        self.model, self.groups = model, assessed_groups(model)
        self.scores = {group.name: [0] * group.units for group, _ in self.groups}
        self.norm_sums = {group.name: [0.0] * group.units for group, _ in self.groups}
        self.samples = 0

    def count(self, ids) -> "ByHand":
        """Add the samples of one forward pass."""
        seen = {}
        handles = [
            group.probe.register_forward_pre_hook(
                lambda _, inputs, name=group.name: seen.update({name: inputs[0].detach()})
            )
            for group, _ in self.groups
        ]
        with torch.no_grad():
            self.model(ids)
        for handle in handles:
            handle.remove()
        self.samples += len(ids)
        for group, count in self.groups:
            for sample in seen[group.name].double():
                units = sample.unflatten(-1, (group.units, group.unit_size))
                norms = [units[:, unit].square().sum().sqrt().item() for unit in range(group.units)]
                top, bottom = largest(norms, count), largest([-norm for norm in norms], count)
                for unit, norm in enumerate(norms):
                    self.scores[group.name][unit] += (unit in top) - (unit in bottom)
                    self.norm_sums[group.name][unit] += norm
        return self

    def check(self, totals: dict[str, GroupTotals], tolerance: float = 1e-11) -> None:
        assert totals.keys() == self.scores.keys()
        for name, total in totals.items():
            assert total.samples == self.samples
            assert total.scores.dtype == torch.int64
            assert total.scores.tolist() == self.scores[name], name
            assert total.norm_sums.tolist() == pytest.approx(self.norm_sums[name], rel=tolerance)


def assert_same(first: dict[str, GroupTotals], second: dict[str, GroupTotals]) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].samples == second[name].samples
        assert torch.equal(first[name].scores, second[name].scores), name
        torch.testing.assert_close(
            first[name].norm_sums, second[name].norm_sums, rtol=1e-11, atol=0
        )


def totals_of(model, *batches, mask=None) -> dict[str, GroupTotals]:
    """Totals after the given forward passes, by an assessment that is taken off again."""
    assessment = make_assessment(model)
    for ids in batches:
        with assessment.assessing(mask), torch.no_grad():
            model(ids)
    assessment.remove()
    return assessment.totals()


def norm_deviations(
    activation: torch.Tensor, unit_size: int, ids: torch.Tensor
) -> list[torch.Tensor]:
    """Standard deviation of the units' norms of every sample, with its graph.

    Args:
        activation: [rows, tokens, units * unit_size].
        unit_size: head_dim, or 1.
        ids: [rows, tokens], equal for the tokens of a row's sample, negative for none.
    """
    found = []
    for row, own in zip(activation, ids, strict=True):
        for sample in own[own >= 0].unique():
            units = row[own == sample].unflatten(-1, (-1, unit_size))
            found.append(units.square().sum((0, 2)).sqrt().std(correction=0))
    return found
