"""Learning rates and stages of arms, by hand."""

import pytest
from reproduce.arms import Arm, main_arms
from reproduce.scales import SCALES
from reproduce.studies import baseline_of

CPU = SCALES["cpu"]


def test_stages_end_one_after_the_other():
    assert Arm("a").stage_ends(CPU) == [1000, 2000, 3000]
    assert Arm("a", stage_batches=0.5).stage_ends(CPU) == [500, 1000, 1500]
    assert Arm("a", stages=1).stage_ends(CPU) == [3000]
    assert Arm("a", stages=2).stage_ends(CPU) == [1500, 3000]


def test_more_stages_than_the_paper_has_rates_for_are_refused():
    with pytest.raises(
        ValueError, match="stages: a has 6, allowed: at most 5, for which the paper"
    ):
        Arm("a", stages=6).stage_ends(CPU)


def test_a_fourth_stage_has_the_papers_rate():
    """A.3: 5e-6 beside 1e-4."""
    arm = Arm("a", stages=4)
    assert arm.stage_ends(CPU) == [750, 1500, 2250, 3000]
    rates = [arm.learning_rate(CPU, place) / CPU.rate for place in (0, 750, 2249, 2250, 2999)]
    assert rates == pytest.approx([1.0, 0.4, 0.1, 0.05, 0.05])


@pytest.mark.parametrize(
    ("schedule", "place", "share"),
    [
        ("stagewise", 0, 1.0), ("stagewise", 999, 1.0), ("stagewise", 1000, 0.4),
        ("stagewise", 2999, 0.1), ("constant", 2999, 1.0), ("wsd", 2399, 1.0), ("wsd", 2400, 1.0),
        ("wsd", 2700, 0.5), ("wsd", 2999, 1 / 600),
    ],
)  # fmt: skip
def test_rates(schedule, place, share):
    assert Arm("a", schedule).learning_rate(CPU, place) == pytest.approx(share * CPU.rate)
    half = Arm("a", schedule, rate=0.5).learning_rate(CPU, place)
    assert half == pytest.approx(share * CPU.rate / 2)


def test_rate_times_batches_is_the_papers_one():
    """1e-4 x 10,000."""
    assert CPU.rate * CPU.stage_batches == pytest.approx(1.0)


def test_names_are_unique_and_a_baseline_has_as_many_seeds_as_what_is_compared():
    arms = main_arms()
    assert len({arm.name for arm in arms}) == len(arms)
    seeds = {arm.name: len(arm.seeds(CPU)) for arm in arms}
    assert seeds["vanilla_stagewise"] == seeds["apex_rank"] == seeds["apex_random"] == 5


def test_weak_units_are_compared_with_an_optimizer_as_fresh_as_theirs():
    """Their rows' moments begin at zero, whatever the base's optimizer knows."""
    (arm,) = (arm for arm in main_arms() if arm.name == "weak_units_only")
    assert baseline_of(arm).name == "vanilla_stagewise_fresh"
