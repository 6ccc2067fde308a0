import math
import statistics

import pytest
from scipy import stats

from apex_composer.report.estimates import difference, estimate, t_quantile


def test_quantiles_are_those_of_student():
    for freedom in range(1, 31):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-5)
    assert t_quantile(3.9) == t_quantile(3) and t_quantile(1000) > stats.t.ppf(0.975, 1000)


def test_an_interval_is_that_of_scipy():
    values = [2.31, 2.35, 2.28, 2.40]
    found = estimate(values)
    expected = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-4)
    assert found.values == tuple(values)


def test_one_seed_has_no_interval():
    assert estimate([2.0]).low is None and estimate([2.0]).mean == 2.0
    assert difference([2.0], [1.0, 1.5, 2.0]).high is None


def test_a_difference_without_pairs_has_the_interval_of_welch():
    own, others = [1.0, 1.2, 0.9, 1.1], [2.0, 2.5, 1.5]
    found = difference(own, others)
    result = stats.ttest_ind(own, others, equal_var=False).confidence_interval(0.95)
    # Degrees of freedom are rounded down, so ours is the wider one.
    assert found.low <= result.low and found.high >= result.high
    assert found.mean == pytest.approx(statistics.fmean(own) - 2.0)
    assert difference([1.0, 1.0], [2.0, 2.0]).low == -1.0
    assert math.isfinite(difference([1.0, 1.0], [2.0, 3.0]).high)


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_what_has_diverged_has_no_interval(end):
    for found in (
        estimate([1.0, end]),
        difference([1.0, end], [1.0, 2.0]),
        difference([1.0, 2.0], [end, -end]),
    ):
        assert found.low is found.high is None and not math.isfinite(found.mean)
