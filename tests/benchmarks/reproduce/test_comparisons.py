import json
import math

import pytest
from campaign_records import APEX, CONSTANT, make_record, small_campaign
from reproduce.comparisons import (
    by_origin,
    difference,
    find_baseline,
    training_difference,
)


def arms(records) -> dict:
    (found,) = by_origin(records).values()
    return {runs.arm: runs for runs in found}


def test_differences_are_of_equal_seeds_and_intervals_students():
    found = arms(small_campaign())
    apex, base = found["apex_rank"], found["vanilla_stagewise"]
    assert find_baseline(apex, list(found.values())) is base
    assert find_baseline(base, list(found.values())) is None
    first = difference(apex, base, 100)
    assert first.values == pytest.approx((0.01, 0.02, 0.03)) and first.mean == pytest.approx(0.02)
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert (first.low, first.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert difference(apex, base, 200).mean == pytest.approx(0.002)
    assert difference(apex, base, 200, ["book"]).mean == pytest.approx(0.002)
    assert difference(apex, base, 0).values == pytest.approx((0, 0, 0))
    assert difference(apex, base, 150) is None
    constant = difference(found["vanilla_constant"], base, 200)
    assert constant.values == pytest.approx((0.1, 0.1))  # of the two seeds that it has


def test_a_domain_has_its_own_difference():
    wide = [make_record("apex_rank", 1, [3.0, 2.9, 2.8], spread=0.7, settings=APEX)]
    found = arms([make_record("vanilla_stagewise", 1, [3.0, 2.9, 2.8]), *wide])
    pair = found["apex_rank"], found["vanilla_stagewise"], 200
    assert difference(*pair, ["code"]).mean == pytest.approx(0.2)
    assert difference(*pair, ["book"]).mean == pytest.approx(-0.2)
    assert difference(*pair, ["book", "code"]).mean == pytest.approx(0)
    assert difference(*pair).mean == pytest.approx(0) and difference(*pair).low is None


@pytest.mark.parametrize("changes", [{"base": "c" * 64}, {"texts": "u"}, {"scale": {"name": "x"}}])
def test_what_is_of_another_base_text_or_scale_is_never_compared(changes):
    records = [make_record("vanilla_stagewise", 1, [3, 2, 1])]
    records.append(make_record("apex_rank", 1, [3, 2, 1], settings=APEX, **changes))
    found = by_origin(records)
    assert [[runs.arm for runs in own] for own in found.values()] == [
        ["vanilla_stagewise"],
        ["apex_rank"],
    ]


def test_the_baseline_has_the_same_stages_and_begins_alike():
    short = {"stage_batches": 0.5}
    records = [
        make_record("vanilla_stagewise", 1, [3, 2, 1]),
        make_record("fresh", 1, [3, 2, 1], settings={"keep_optimizer": False}),
        make_record("short", 1, [3, 2, 1], ends=[50, 100], settings=short),
        make_record("apex", 1, [3, 2, 1], settings=APEX),
        make_record("apex_fresh", 1, [3, 2, 1], settings=APEX | {"keep_optimizer": False}),
        make_record("apex_short", 1, [3, 2, 1], ends=[50, 100], settings=APEX | short),
        make_record("apex_long", 1, [3, 2, 1], ends=[100, 300], settings=APEX),
        make_record("apex_one_stage", 1, [3, 1], ends=[200], settings=APEX | {"stages": 1}),
        make_record("averaged", 1, [3, 1], ends=[200], settings=CONSTANT, averaged_batches=[200]),
        make_record("fast", 1, [3, 2, 1], settings={"rate": 2.0}),
        make_record("apex_fast", 1, [3, 2, 1], settings=APEX | {"rate": 2.0}),
        make_record("apex_other_seed", 9, [3, 2, 1], settings=APEX),
    ]
    found = arms(records)
    chosen = {name: find_baseline(runs, list(found.values())) for name, runs in found.items()}
    assert {name: base and base.arm for name, base in chosen.items()} == {
        "vanilla_stagewise": None,
        "fresh": "vanilla_stagewise",
        "short": None,
        "apex": "vanilla_stagewise",
        "apex_fresh": "fresh",
        "apex_short": "short",
        "apex_long": None,
        "apex_one_stage": None,  # it would be credited with another schedule
        "averaged": "vanilla_stagewise",
        "fast": "vanilla_stagewise",
        "apex_fast": "fast",
        "apex_other_seed": None,
    }
    # Stages that end elsewhere have other rates before the end.
    apex, base = found["apex_one_stage"], found["vanilla_stagewise"]
    assert difference(apex, base, 0) is None and difference(apex, base, 200).mean == 0


def test_two_results_of_one_run_must_agree():
    record = make_record("vanilla_stagewise", 1, [3, 2, 1])
    again = make_record("vanilla_stagewise", 1, [3, 2, 1], study="rates")
    (found,) = arms([record, again]).values()
    assert list(found.by_seed) == [1] and found.studies == ("main", "rates")
    again["losses"][1]["book"] += 1
    with pytest.raises(ValueError, match="vanilla_stagewise, seed 1: two results.*Remove one"):
        by_origin([record, again])


def test_a_run_that_two_questions_asked_for_is_in_both():
    record = make_record("vanilla_stagewise", 1, [3, 2, 1])
    found = arms([record, record | {"study": "rates"}])["vanilla_stagewise"]
    assert [list(found.of(study).by_seed) for study in ("main", "rates")] == [[1], [1]]


def test_results_that_have_diverged_alike_agree():
    record = make_record("vanilla_stagewise", 1, [3, math.nan, math.nan])
    again = json.loads(json.dumps(record))
    assert list(arms([record, again])["vanilla_stagewise"].by_seed) == [1]


@pytest.mark.parametrize(
    "changes", [{"ends": [200], "losses": [3, 1]}, {"ends": [100, 200], "losses": [3, 2]}]
)
def test_runs_without_some_of_their_stages_are_refused(changes):
    record = make_record("apex_rank", 1, [3, 2, 1], settings=APEX)
    losses, ends = changes["losses"], changes["ends"]
    short = make_record("apex_rank", 2, losses, ends=ends, settings=APEX)
    with pytest.raises(ValueError, match="apex_rank, seed 2: .*Remove the line"):
        by_origin([record, short])


def test_fresh_moments_are_held_against_stages_with_fresh_moments_and_no_operators():
    """The reset alone changes a run: beside plain training it would pass for what operators do."""
    fresh = {"variation": {"fresh_moments": True}}
    records = [
        make_record("vanilla_stagewise", 1, [3, 2, 1]),
        make_record(
            "vanilla_fresh_moments",
            1,
            [3, 2, 1.2],
            settings={"apex": {"expansion": False}, **fresh},
        ),
        make_record("apex_fresh_moments", 1, [3, 2, 1.3], settings={"apex": {}, **fresh}),
        make_record("selection_only", 1, [3, 2, 1], settings={"apex": {"expansion": False}}),
    ]
    found = arms(records)
    baselines = {name: find_baseline(own, list(found.values())) for name, own in found.items()}
    assert baselines["apex_fresh_moments"] is found["vanilla_fresh_moments"]
    for name in ("vanilla_fresh_moments", "selection_only"):
        assert baselines[name] is found["vanilla_stagewise"]


def test_training_losses_are_compared_stage_by_stage_of_equal_batches():
    plain = [5.0, 4.0, 3.0, 2.0, 1.0]
    changed = [*(one + 0.5 for one in plain), *(one - 0.25 for one in plain)]
    odd = {"ends": [102, 200]}
    records = [
        make_record("vanilla_stagewise", 1, [3, 2, 1], training_losses=plain * 2),
        make_record("apex", 1, [3, 2, 1], settings=APEX, training_losses=changed),
        # Of an average there are means of other batches, and of other stages too.
        make_record("averaged", 1, [3, 2, 1], training_losses=[*plain, *plain, 1.0]),
        make_record("odd", 1, [3, 2, 1], training_losses=[*plain, 9.0, *plain, 9.0], **odd),
        make_record("odd_apex", 1, [3, 2, 1], settings=APEX,
                    training_losses=[*plain, 3.0, *plain, 12.0], **odd),
    ]  # fmt: skip
    found = arms(records)
    base = found["vanilla_stagewise"]
    assert training_difference(found["apex"], base, 0).mean == pytest.approx(0.5)
    assert training_difference(found["apex"], base).mean == pytest.approx(-0.25)
    assert training_difference(found["averaged"], base) is None
    assert training_difference(found["odd"], base) is None
    # 102 batches are five means of 20 and one of 2; 98 five of 19 and one of 3.
    pair = found["odd_apex"], found["odd"]
    assert training_difference(*pair, 0).mean == pytest.approx(-6 * 2 / 102)
    assert training_difference(*pair, 1).mean == pytest.approx(3 * 3 / 98)
