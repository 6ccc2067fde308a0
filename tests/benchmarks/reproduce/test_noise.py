import math

import pytest
from campaign_records import small_campaign
from reproduce.comparisons import by_origin
from reproduce.noise import MOST_SEEDS, _t, noise, seeds_needed


def arms(records) -> dict:
    (found,) = by_origin(records).values()
    return {runs.arm: runs for runs in found}


def test_noise_is_pooled_over_arms_and_leaves_out_what_is_equal_in_every_bit():
    found = arms(small_campaign())
    base = found["vanilla_stagewise"]
    apex = noise([(found["apex_rank"], base)])
    assert apex.paired == pytest.approx(0.001) and apex.paired_freedom == 2
    assert apex.single == pytest.approx(0.101) and apex.single_freedom == 2
    same = noise([(found["selection_only"], base)])
    assert (same.paired, same.seeds) == (None, None) and same.single == pytest.approx(0.1)
    both = noise([(found[name], base) for name in ("apex_rank", "selection_only")])
    assert both.single == pytest.approx(math.sqrt((0.101**2 + 0.1**2) / 2))
    assert (both.single_freedom, both.paired_freedom) == (4, 2)


def test_the_seeds_that_are_needed():
    assert seeds_needed(12, delta=8) == 20  # the example of MedCalc's manual for paired samples
    assert seeds_needed(0.0, 0.005) == 2 and seeds_needed(1e9, 0.005) == MOST_SEEDS
    # scipy 1.17: t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1); the exact non-central t gives the same.
    exact = {0.0013: 3, 0.002: 4, 0.005: 10, 0.0135: 60, 0.02: 128, 0.05: 787}
    assert {deviation: seeds_needed(deviation) for deviation in exact} == exact
    needed = [seeds_needed(deviation) for deviation in (0.0005, 0.0013, 0.005, 0.05)]
    assert needed == sorted(needed) and needed[-1] > 500


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 1.376), (2, 1.061), (4, 0.941), (10, 0.879), (30, 0.854)]
)
def test_the_quantile_of_the_power(freedom, quantile):
    assert _t(freedom, 0.8) == pytest.approx(quantile, rel=0.01)
