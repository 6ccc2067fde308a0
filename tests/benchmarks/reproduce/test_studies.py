from collections import Counter

import pytest
from reproduce import studies as module
from reproduce.arms import Arm, is_conventional, main_arms, same_schedule
from reproduce.scales import SCALES
from reproduce.studies import arms_of, baseline_of, studies
from reproduce.variations import check_variation

SCALE = SCALES["cpu"]
ALL = [arm for study in studies() if study != "confirm" for arm in arms_of(study)]


def test_arms_know_their_study_and_no_two_have_one_name():
    assert all(arm.study == study for study in studies() for arm in arms_of(study))
    assert max(Counter(arm.name for arm in ALL).values()) == 1
    assert {arm.name for arm in main_arms()} <= {arm.name for arm in ALL}
    assert all(arms_of(study) for study in studies() if study != "confirm")


@pytest.mark.parametrize("arm", [arm for arm in ALL if arm.apex is not None], ids=lambda a: a.name)
def test_every_arm_has_one_baseline_with_its_rates_its_seeds_and_no_apex(arm):
    equals = [one for one in ALL if is_conventional(one) and same_schedule(arm, one)]
    baseline = baseline_of(arm)
    assert equals == [baseline]
    fresh = "fresh_moments" in arm.variation
    assert ("fresh_moments" in baseline.variation) is fresh and bool(baseline.apex) is fresh
    places = range(0, arm.stage_ends(SCALE)[-1], 50)
    rates = [arm.learning_rate(SCALE, place) for place in places]
    assert rates == [baseline.learning_rate(SCALE, place) for place in places]
    assert set(arm.seeds(SCALE)) <= set(baseline.seeds(SCALE))


@pytest.mark.parametrize("arm", [arm for arm in ALL if arm.study not in ("main", "scratch")])
def test_variations_are_known_and_one_thing_at_a_time(arm):
    if arm.apex is None:
        assert not arm.variation  # nothing would act on it
    else:
        check_variation(arm)
    plain = Arm("plain")
    schedule = {arm.stages, arm.stage_batches} != {plain.stages, plain.stage_batches}
    varied = [schedule, arm.base != plain.base, bool(arm.apex or arm.variation)]
    if arm.study in ("shift", "context", "superfluous", "stage_length", "stage_count"):
        assert not arm.variation
    else:
        assert varied == [False, False, True]


def test_fewer_stages_divide_the_whole_run_s_batches():
    ends = {arm.name: arm.stage_ends(SCALE) for arm in arms_of("stage_count")}
    assert ends["apex_one_stage"] == [3000] and ends["apex_two_stages"] == [1500, 3000]


def test_stages_are_longer_at_the_same_rate_and_at_the_same_product():
    arms = {arm.name: arm for arm in arms_of("stage_length")}
    long, product = arms["apex_stage_double_same_rate"], arms["apex_stage_double_same_product"]
    assert long.stage_ends(SCALE) == product.stage_ends(SCALE) == [2000, 4000, 6000]
    assert long.learning_rate(SCALE, 0) == 2 * product.learning_rate(SCALE, 0) == SCALE.rate


def test_what_looked_better_has_more_seeds_and_so_has_its_baseline(monkeypatch):
    monkeypatch.setattr(module, "FOLLOWED", ("apex_two_stages", "context_apex_rank"))
    arms = [arm for study in studies() if study != "confirm" for arm in arms_of(study)]
    seeds = {arm.name: len(arm.seeds(SCALE)) for arm in arms}
    more = {"apex_two_stages", "vanilla_two_stages", "context_apex_rank"}
    more |= {"context_vanilla_stagewise"}
    assert {seeds[name] for name in more} == {SCALE.followed_seeds} == {3}
    others = [arm.name for arm in ALL if arm.study != "main"]
    assert {seeds[name] for name in others if name not in more} == {SCALE.study_seeds} == {1}


def test_what_is_confirmed_has_fresh_seeds_and_its_baseline(monkeypatch):
    monkeypatch.setattr(module, "CONFIRMED", ("apex_operator_rate_10", "vanilla_rate_0.2"))
    monkeypatch.setattr(module, "FOLLOWED", ("apex_operator_rate_10",))
    found = {arm.name: arm for arm in arms_of("confirm")}
    assert set(found) == {"apex_operator_rate_10", "vanilla_rate_0.2", "vanilla_stagewise"}
    assert all(list(arm.seeds(SCALE)) == [101, 102, 103, 104, 105] for arm in found.values())
    assert found["apex_operator_rate_10"].apex == {"operator_lr_scale": 10.0}
    assert baseline_of(found["apex_operator_rate_10"]).name == "vanilla_stagewise"


def test_moments_that_begin_anew_are_confirmed_against_plain_training_that_does_the_same(
    monkeypatch,
):
    monkeypatch.setattr(module, "CONFIRMED", ("apex_authors",))
    assert {arm.name for arm in arms_of("confirm")} == {"apex_authors", "vanilla_fresh_moments"}
    monkeypatch.setattr(module, "FOLLOWED", ("apex_authors",))
    seeds = {arm.name: len(arm.seeds(SCALE)) for arm in arms_of("authors")}
    assert seeds == {"apex_authors": 3, "apex_authors_operator": 1, "vanilla_fresh_moments": 3}


def test_an_arm_without_a_baseline_is_refused():
    with pytest.raises(LookupError, match="odd has no conventional arm of equal schedule"):
        baseline_of(Arm("odd", apex={}, rate=0.123))
