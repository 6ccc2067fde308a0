"""Ranks against Python's stable sort, ties included; counts of several microbatches."""

import torch
from helpers import largest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.assessment.scores import (
    GroupTotals,
    add_counts,
    count_samples,
    indicator_of_largest,
    rank_scores,
)

few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
rows_and_count = st.integers(1, 12).flatmap(
    lambda units: st.tuples(
        st.lists(st.lists(few_values, min_size=units, max_size=units), min_size=1, max_size=4),
        st.integers(1, units),
    )
)


@given(rows_and_count)
@settings(max_examples=200)
def test_indicator_of_largest_gives_ties_to_the_lower_index(drawn):
    rows, count = drawn
    found = indicator_of_largest(torch.tensor(rows), count)
    assert found.dtype == torch.bool
    for row, marked in zip(rows, found.tolist(), strict=True):
        assert {place for place, mark in enumerate(marked) if mark} == largest(row, count)


@given(rows_and_count, st.data())
@settings(max_examples=100)
def test_rank_scores_add_up_the_valid_samples(drawn, data):
    rows, count = drawn
    valid = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    expected = [0] * len(rows[0])
    for row, counts in zip(rows, valid, strict=True):
        if counts:
            for place in largest(row, count):
                expected[place] += 1
            for place in largest([-value for value in row], count):
                expected[place] -= 1
    assert rank_scores(torch.tensor(rows), count, torch.tensor(valid)).tolist() == expected


def test_rank_scores_of_several_groups_are_each_groups_own():
    norms = torch.rand(3, 5, 8)
    expected = torch.stack([rank_scores(group, 2) for group in norms])
    assert torch.equal(rank_scores(norms, 2), expected)


def test_counts_add_up_to_those_of_all_samples():
    norms = torch.rand(3, 5, 8, dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True])
    expected = count_samples(norms.square(), 2, valid)
    parts = [count_samples(norms[:, s].square(), 2, valid[s]) for s in (slice(2), slice(2, 5))]
    assert add_counts(None, None) is None
    for found in (add_counts(*parts), add_counts(add_counts(None, parts[0]), parts[1])):
        assert torch.equal(found.scores, expected.scores) and int(found.samples) == 4
        torch.testing.assert_close(found.norm_sums, norms[:, valid].sum(1))


def test_totals_rank_by_scores_or_by_mean_norms():
    totals = GroupTotals(torch.tensor([1, -1]), torch.tensor([3.0, 6.0]).double(), 3)
    assert totals.ranked_by("rank").tolist() == [1, -1]
    assert totals.ranked_by("average").tolist() == [1.0, 2.0]
