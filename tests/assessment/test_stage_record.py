"""The record of a stage: plain data, overlaps with the last stage, spread of norms."""

import json

import pytest
import torch
from helpers import selection

from apex_composer.assessment.scores import GroupTotals
from apex_composer.assessment.stage_record import jaccard, norm_spread, stage_record

FIRST = {"heads": selection([0, 1], [2, 3]), "channels": selection([5, 7, 9], [0, 1, 2])}
SECOND = {"heads": selection([0, 1], [4, 5]), "channels": selection([5, 7, 8], [0, 1, 3])}


def totals_of(norm_sums: list[float], samples: int) -> GroupTotals:
    scores = torch.zeros(len(norm_sums), dtype=torch.int64)
    return GroupTotals(scores, torch.tensor(norm_sums, dtype=torch.float64), samples)


def test_a_first_stage_has_no_overlap():
    record = stage_record(0, True, {}, FIRST, {"heads": totals_of([2.0, 4.0], 2)})
    assert record == {
        "stage": 0,
        "expansion": True,
        "samples": 2,
        "advantageous": {"heads": [0, 1], "channels": [5, 7, 9]},
        "disadvantageous": {"heads": [2, 3], "channels": [0, 1, 2]},
        "overlap": {},
        "norm_std": {"heads": 0.5},  # of the means 1 and 2
    }


def test_overlap_is_the_jaccard_index_of_both_sets_with_the_last_stage():
    record = stage_record(1, True, FIRST, SECOND, {})
    assert record["overlap"] == {"heads": [1.0, 0.0], "channels": [0.5, 0.5]}


def test_groups_that_are_new_have_no_overlap():
    record = stage_record(1, True, {"heads": FIRST["heads"]}, SECOND, {})
    assert record["overlap"] == {"heads": [1.0, 0.0]}


def test_spread_is_that_of_the_mean_norms():
    totals = {"a": totals_of([3, 6, 9, 12], 3), "b": totals_of([5, 5], 5)}
    # Of 1, 2, 3, 4 and of 1, 1: the spread over all units, not an estimate from some.
    assert norm_spread(totals) == {"a": pytest.approx(1.25**0.5), "b": 0.0}
    record = stage_record(0, False, {}, FIRST, totals)
    assert (record["norm_std"], record["samples"]) == (norm_spread(totals), 5)


def test_random_selection_before_any_training_has_no_statistics():
    record = stage_record(0, True, {}, FIRST, {})
    assert (record["samples"], record["norm_std"]) == (0, {})


def test_a_record_is_plain_data():
    record = stage_record(1, True, FIRST, SECOND, {"heads": totals_of([1.0, 2.0], 4)})
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [([1, 2], [2, 1], 1.0), ([1, 2], [3, 4], 0.0), ([1, 2, 3], [2, 3, 4], 0.5)],
)
def test_jaccard(first, second, overlap):
    assert jaccard(torch.tensor(first), torch.tensor(second)) == overlap
