import math

import pytest
from made_runs import APEX, curve, make_run

from apex_composer.report.answers import answer

PLAIN, BETTER = [4.0, 3.0, 2.5], [4.0, 2.6, 2.4]


def pair():
    return [make_run("vanilla", {"cc": PLAIN}), make_run("apex", {"cc": BETTER}, settings=APEX)]


def test_the_run_without_a_method_is_the_baseline_and_the_other_is_compared():
    found = answer(pair())
    assert found.baselines == ("vanilla",)
    assert [(group.name, group.baseline) for group in found.groups] == [
        ("vanilla", True),
        ("apex", False),
    ]
    final = found.finals["apex"]["cc"]
    assert final.loss_difference.mean == pytest.approx(-0.1) and final.loss_difference.low is None
    change = math.exp(2.4) - math.exp(2.5)
    assert final.perplexity_difference.mean == pytest.approx(change)
    assert found.finals["vanilla"]["cc"].loss_difference is None
    assert found.settings == {"algorithms.apex.threshold": ("not set", "0.125")}
    assert found.hidden == ("run_name",)


def test_one_seed_claims_nothing_beyond_itself():
    found = answer(pair())
    assert "how much of that is chance cannot be said" in found.sentence
    assert f"of {math.exp(2.4):.3f}, vanilla at {math.exp(2.5):.3f}" in found.sentence
    assert "apex reaches vanilla's final perplexity after 15 k tokens" in found.sentence
    assert "apex has one seed: another may give another result." in found.cautions


def seeds(losses, **options):
    return [
        make_run(validation={"cc": [4.0, loss]}, seed=seed, **options)
        for seed, loss in enumerate(losses)
    ]


def test_seeds_are_one_group_and_pairs_give_the_interval():
    plain = seeds([2.5, 2.7, 2.9], name="vanilla")
    clear = answer([*plain, *seeds([2.4, 2.61, 2.79], name="apex", settings=APEX)])
    assert [len(group.runs) for group in clear.groups] == [3, 3]
    final = clear.finals["apex"]["cc"]
    assert final.paired and final.loss_difference.values == pytest.approx((-0.1, -0.09, -0.11))
    assert final.loss_difference.high < 0 and "does not include 0" in clear.sentence
    noise = answer([*plain, *seeds([2.4, 2.8, 2.9], name="apex", settings=APEX)])
    assert "these runs show no difference" in noise.sentence


def test_a_run_twice_is_no_second_seed():
    run = make_run("vanilla", {"cc": PLAIN})
    assert [len(group.runs) for group in answer([run, run, *pair()[1:]]).groups] == [1, 1, 1]


def test_the_most_similar_of_several_baselines_is_the_first():
    constant = make_run("constant", {"cc": PLAIN}, settings={"scheduler.name": "constant"})
    base = make_run("base", {"cc": PLAIN}, settings={"max_duration": "1ba"})
    elsewhere = make_run("elsewhere", {"cc": PLAIN}, settings={"load_path": "x.pt"})
    found = answer([base, elsewhere, constant, *pair()])
    assert found.baselines == ("vanilla", "constant")
    assert {(r.group, r.baseline) for r in found.reaches} == {
        ("base", "vanilla"),
        ("constant", "vanilla"),
        ("apex", "vanilla"),
        ("base", "constant"),
        ("vanilla", "constant"),
        ("apex", "constant"),
    }
    assert any("elsewhere begins with other weights" in line for line in found.cautions)
    given = answer([base, constant, *pair()], ["constant"])
    assert given.baselines == ("constant",) and given.baseline_rule == "as given"
    assert "differ in more than APEX: scheduler.name" in " ".join(given.cautions)
    with pytest.raises(ValueError, match="baseline: got 'vanila'.*Known: vanilla, apex"):
        answer(pair(), ["vanila"])


def test_totals_of_different_text_are_not_compared():
    one = make_run("vanilla", {"a": [2.0], "b": [1.0]}, tokens={"a": 10, "b": 10})
    other = make_run("apex", {"a": [2.0], "b": [1.0]}, tokens={"a": 10, "b": 99}, settings=APEX)
    found = answer([one, other])
    assert found.domains == ("a", "b", "total")
    assert found.finals["apex"]["total"].loss_difference is None
    assert found.finals["apex"]["a"].loss_difference.mean == 0
    assert any("evaluate different text" in line for line in found.cautions)
    unknown = answer([make_run("vanilla", {"a": [2.0], "b": [1.0]})])
    assert unknown.domains == ("a", "b") and "There is no total" in " ".join(unknown.cautions)


def test_what_cannot_be_answered_is_said():
    assert "no perplexity to compare" in answer([make_run("a", {})]).sentence
    assert "there is one run" in answer([make_run("a", {"cc": PLAIN})]).sentence
    both = [make_run(n, {"cc": PLAIN}, settings={**APEX, "x": n}) for n in "ab"]
    assert "name it with --baseline" in answer(both).sentence
    kept = make_run("a", {"cc": PLAIN}, missing=["scores: none"])
    assert answer([kept]).missing == {"a": ("scores: none",)}


def test_speeds_are_medians_with_quartiles():
    runs = pair()
    speed = answer(runs).speeds["vanilla"]
    quartiles = speed.lower_quartile, speed.median, speed.upper_quartile
    assert quartiles == pytest.approx((0.15, 0.2, 0.25))
    assert speed.tokens_per_second == pytest.approx(1000 / 0.2) and speed.mfu is None
    metrics = {
        "throughput/device/mfu": curve([0.3, 0.5, 0.4]),
        "apex/milliseconds_per_step": curve([2, 4, 6]),
    }
    timed = make_run("apex", {"cc": PLAIN}, settings=APEX, metrics=metrics)
    speed = answer([timed]).speeds["apex"]
    assert speed.mfu == 0.4 and speed.apex_share == pytest.approx(0.004 / 0.2)


def test_versions_that_differ_are_told_from_the_others():
    one, other = pair()
    newer = make_run(
        "apex", {"cc": PLAIN}, settings=APEX, versions={"torch": "2.8.0", "python": "3.12"}
    )
    found = answer([one, newer])
    assert found.versions == {"torch": ("2.7.0", "2.8.0"), "python": ("unknown", "3.12")}
    assert answer([one, other]).same_versions == {"torch": "2.7.0"}
