"""Ranks against Python's stable sort, ties included."""

import torch
from helpers import largest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.assessment.scores import indicator_of_largest, rank_scores

few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
rows_and_count = st.integers(1, 12).flatmap(
    lambda units: st.tuples(
        st.lists(st.lists(few_values, min_size=units, max_size=units), min_size=1, max_size=4),
        st.integers(1, units),
    )
)


@given(rows_and_count)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_indicator_of_largest_gives_ties_to_the_lower_index(drawn):
    rows, count = drawn
    found = indicator_of_largest(torch.tensor(rows), count)
    assert found.dtype == torch.bool
    for row, marked in zip(rows, found.tolist(), strict=True):
        assert {place for place, mark in enumerate(marked) if mark} == largest(row, count)


@given(rows_and_count, st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
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
