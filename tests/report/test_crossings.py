import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import curve, make_run

from apex_composer.report.crossings import (
    TOTAL,
    find_crossing,
    find_reach,
    show_tokens,
    validation_curve,
)
from apex_composer.report.groups import make_groups
from apex_composer.report.run import Curve

losses = st.lists(st.floats(1.0, 5.0), min_size=2, max_size=12)


@given(values=losses, target=st.floats(1.0, 5.0))
def test_a_crossing_lies_on_the_curve_and_holds_to_the_end(values, target):
    own = curve(values)
    tokens, after, by = find_crossing(own, target)
    if by is None:
        assert values[-1] > target and tokens is None and after == own.tokens[-1]
        return
    place = list(own.tokens).index(by)
    assert all(value <= target for value in values[place:])
    if place == 0:
        assert tokens == 0.0 and after == 0
        return
    assert values[place - 1] > target and after == own.tokens[place - 1]
    assert after <= tokens <= by
    part = (tokens - after) / (by - after)
    assert values[place - 1] + part * (values[place] - values[place - 1]) == pytest.approx(target)


@given(values=losses, target=st.floats(1.0, 5.0), easier=st.floats(0.0, 1.0))
def test_an_easier_target_is_reached_no_later(values, target, easier):
    hard, easy = find_crossing(curve(values), target), find_crossing(curve(values), target + easier)
    if hard[2] is not None:
        assert easy[2] <= hard[2] and easy[0] <= hard[0] + 1e-6


@given(values=losses)
def test_a_falling_curve_reaches_its_own_end_at_its_end(values):
    falling = sorted(set(values), reverse=True)
    own = curve(falling)
    assert find_crossing(own, falling[-1])[0] == pytest.approx(own.tokens[-1])


def test_a_dip_that_does_not_hold_is_no_crossing():
    assert find_crossing(curve([3.0, 1.9, 2.1, 1.9]), 2.0) == (25_000.0, 20_000, 30_000)
    assert find_crossing(curve([3.0, 1.9, 2.1]), 2.0) == (None, 20_000, None)
    assert find_crossing(curve([3.0, math.nan, 1.0]), 2.0) == (None, 10_000, 20_000)
    late = Curve([10], [10_000], [1.0])
    assert find_crossing(late, 2.0) == (None, 0, 10_000)


def test_the_total_is_weighted_by_predicted_tokens():
    run = make_run("r", {"a": [4.0, 2.0], "b": [2.0, 1.0]}, tokens={"a": 300, "b": 100})
    assert validation_curve(run, TOTAL).values == [3.5, 1.75]
    assert validation_curve(make_run("r", {"a": [4.0], "b": [2.0]}), TOTAL) is None
    assert validation_curve(make_run("r", {"a": [4.0]}), TOTAL).values == [4.0]


def reach(own, others, paired=True):
    runs = [make_run("fast", {"a": v}, seed=s, settings={"optimizer.lr": 1}) for s, v in own]
    runs += [make_run("slow", {"a": v}, seed=s) for s, v in others]
    fast, slow = make_groups(runs)
    return find_reach(fast, slow, "a", paired)


def test_each_seed_is_compared_with_its_own_baseline():
    found = reach(
        [(1, [4.0, 2.0, 1.0]), (2, [4.0, 3.0, 1.0])], [(1, [4.0, 3.5, 3.0]), (2, [4.0, 3.0, 2.0])]
    )
    assert [crossing.target for crossing in found.crossings] == [3.0, 2.0]
    assert found.tokens.values == (5_000.0, 15_000.0) and found.share.mean == 0.5
    assert "interval over 2 seeds" in found.text
    assert "fast reaches slow's final perplexity after 10 k tokens, 50 %" in found.text
    shared = reach([(1, [4.0, 2.0, 1.0])], [(8, [4.0, 3.0]), (9, [4.0, 2.0])], paired=False)
    assert shared.crossings[0].target == 2.5


def test_what_is_not_reached_is_said_with_its_bound():
    found = reach([(1, [4.0, 3.5])], [(1, [4.0, 3.0])])
    assert found.tokens is None and found.crossings[0].after == 10_000
    assert found.text == "fast does not reach slow's final perplexity within 10 k tokens."


def test_one_evaluation_is_too_few_to_say_where():
    late = make_run("fast", {}, settings={"optimizer.lr": 1})
    runs = [replace(late, validation={"a": curve([2.0], first=30)})]
    runs.append(make_run("slow", {"a": [4.0, 3.0]}))
    fast, slow = make_groups(runs)
    found = find_reach(fast, slow, "a", True)
    assert found.tokens is None and "evaluated too seldom" in found.text


def test_tokens_are_shown_for_people():
    assert [show_tokens(n) for n in (7.86e9, 614_400, 12)] == ["7.86 B", "614.4 k", "12"]


def test_a_baseline_that_ends_no_better_than_it_began_is_no_goal():
    found = reach([(1, [3.0, 2.5])], [(1, [3.0, 3.5])])
    assert found.text.startswith("slow ends no better than it began (1 of 1 seeds), so that")
    assert found.crossings == () and found.tokens is None and found.share is None
    late = [make_run("slow", {}, settings={"x": 1})]
    late = [replace(run, validation={"a": curve([3.5], first=10)}) for run in late]
    fast, slow = make_groups([make_run("fast", {"a": [3.0, 2.5]}), *late])
    found = find_reach(fast, slow, "a", True)
    assert "fast is at slow's final perplexity or below before any training" in found.text
    assert "%" not in found.text


def test_equal_runs_take_all_of_the_baselines_tokens():
    found = reach([(1, [4.0, 3.0, 2.0])], [(1, [4.0, 3.0, 2.0])])
    assert found.share.mean == 1.0 and "100 % of slow's 20 k" in found.text


def test_other_batches_and_other_evaluations_are_compared_by_their_tokens():
    double = Curve([0, 3, 7], [0, 6_000, 14_000], [4.0, 3.0, 1.0])
    runs = [replace(make_run("fast", {}, settings={"x": 1}), validation={"a": double})]
    fast, slow = make_groups([*runs, make_run("slow", {"a": [4.0, 2.0]})])
    assert find_reach(fast, slow, "a", True).tokens.mean == pytest.approx(10_000)


def test_without_pairs_the_baselines_own_spread_is_said_to_be_left_out():
    own, others = [(1, [4.0, 2.0]), (2, [4.0, 1.5])], [(8, [4.0, 3.0]), (9, [4.0, 2.9])]
    assert "without what slow varies by itself" in reach(own, others, paired=False).text
