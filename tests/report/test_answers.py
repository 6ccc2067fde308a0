import math
from dataclasses import replace
from importlib.metadata import distribution

import pytest
from made_runs import APEX, curve, make_run

from apex_composer.report.answers import answer
from apex_composer.report.groups import METHODS
from apex_composer.report.run import Stage

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
    # Of every seed: two groups that are alike, but not among themselves.
    runs = [*seeds([2.5, 2.6], name="vanilla"), *seeds([2.4, 2.5], name="apex", settings=APEX)]
    mixed = [replace(run, versions={"torch": f"2.{7 + n % 2}.0"}) for n, run in enumerate(runs)]
    found = answer(mixed)
    assert found.versions == {"torch": ("2.7.0, 2.8.0",) * 2} and not found.same_versions
    assert "The runs had different versions of torch." in found.cautions


def test_a_diverged_run_is_said_and_no_interval_is_claimed():
    for end in (math.nan, math.inf, 800.0):
        plain = seeds([2.5, 2.7], name="vanilla")
        found = answer([*plain, *seeds([2.4, end], name="apex", settings=APEX)])
        assert "a run has diverged" in found.sentence and "interval" not in found.sentence
        assert "e+" not in found.sentence and len(found.sentence) < 200
        other = answer(
            [*seeds([end, end], name="vanilla"), *seeds([2.4, 2.5], name="apex", settings=APEX)]
        )
        assert "a run has diverged" in other.sentence
        assert "vanilla has diverged" in " ".join(other.cautions) or end == 800.0
    assert any("apex has diverged" in line for line in answer([*plain, *diverged()]).cautions)
    assert answer([*plain, *diverged()]).reaches[0].tokens is None


def diverged():
    return seeds([2.4, math.nan], name="apex", settings=APEX)


def test_differences_that_are_tiny_are_no_signed_zeros():
    def sentence(base, own):
        runs = [make_run("vanilla", {"cc": [math.log(base)]})]
        return answer([*runs, make_run("apex", {"cc": [math.log(own)]}, settings=APEX)]).sentence

    assert "a difference of -0.002 (less than 0.01 %)" in sentence(60.559, 60.557)
    assert "a difference of less than 0.001 (less than 0.01 %)" in sentence(60, 60.0001)
    assert "a difference of +0.000 (+0.00 %)" in sentence(60, 60)
    assert "a difference of +0.600 (+1.00 %)" in sentence(60, 60.6)
    assert "-0.00" not in sentence(60, 59.9999)
    plain = seeds([2.5, 2.7], name="vanilla")
    close = seeds([2.5 + 1e-8, 2.7 - 1e-8], name="apex", settings=APEX)
    assert "-0.000" not in answer([*plain, *close]).sentence
    assert "at 1.63e+08" in sentence(1.628e8, 60)


def test_pairs_have_all_their_seeds_alike():
    order = {"train_loader.dataset.shuffle_seed": 1}

    def both(**own):
        runs = [make_run("vanilla", {"cc": PLAIN}, seed=k, settings=order) for k in (1, 2)]
        runs += [
            make_run("apex", {"cc": BETTER}, seed=k, settings={**APEX, **order, **own})
            for k in (1, 2)
        ]
        return answer(runs)

    assert both().finals["apex"]["cc"].paired
    assert any("All seeds of apex read the data in one order" in c for c in both().cautions)
    own = both(**{"algorithms.apex.seed": 5})
    assert own.finals["apex"]["cc"].paired
    other = both(**{"train_loader.dataset.shuffle_seed": 2})
    assert not other.finals["apex"]["cc"].paired
    assert "have other seeds (train_loader.dataset.shuffle_seed)" in " ".join(other.cautions)
    single = [make_run("vanilla", {"cc": PLAIN})]
    single.append(make_run("apex", {"cc": BETTER}, seed=3, settings=APEX))
    assert "have other seeds (seed)" in " ".join(answer(single).cautions)


def test_whatever_differs_beside_the_method_is_said():
    def cautions(settings):
        runs = [
            make_run("vanilla", {"cc": PLAIN}),
            make_run("x", {"cc": BETTER}, settings=settings),
        ]
        return " ".join(answer(runs, ["vanilla"]).cautions)

    lr = {"optimizer.lr": 5e-4}
    assert "x and vanilla differ in more than APEX: optimizer.lr." in cautions({**APEX, **lr})
    hft = {"algorithms.hft.share": 0.5}
    assert "differ in more than hft: optimizer.lr." in cautions({**hft, **lr})
    assert "differ" not in cautions(hft) and "differ" not in cautions(lr)
    assert "differ in 2 settings: optimizer.lr, z." in cautions({**lr, "z": 1})
    many = cautions({**APEX, **{f"z{k}": 1 for k in range(30)}})
    assert "and 22 more, all below" in many
    vanilla, apex = pair()
    found = answer([replace(vanilla, settings={}), apex], ["vanilla"]).cautions
    assert [c for c in found if "differ" in c] == [
        "Not all settings are known: the runs may differ in more than is shown."
    ]


def test_a_run_without_an_evaluation_is_the_reason_that_is_given():
    runs = [*seeds([2.5, 2.6, 2.7], name="vanilla"), *seeds([2.4, 2.5], name="apex", settings=APEX)]
    dead = replace(make_run("apex", {}, seed=2, settings=APEX), name="apex-seed2")
    told = "apex and vanilla cannot be compared: apex-seed2 has no evaluation. Leave it out."
    assert answer([*runs, dead]).sentence == told


def test_a_method_that_has_stages_is_not_taken_for_apex():
    """S2FT is APEX without operators, and logs its units as a stage."""
    stage = Stage(0, 0, False, {}, {}, {}, {}, {})
    s2ft = {"algorithms.s2ft.trainable_share": 0.024, "optimizer.lr": 1}
    other = make_run("s2ft", {"cc": PLAIN}, settings=s2ft, stages=[stage])
    found = answer([other, *pair()])
    assert found.sentence.startswith("apex ends")
    found = answer([other, pair()[0]])
    assert "differ in more than s2ft: optimizer.lr" in " ".join(found.cautions)
    unknown = replace(other, name="u", settings={})
    assert answer([pair()[0], unknown], ["vanilla"]).sentence.startswith("u ends")


def test_the_baseline_is_sought_for_the_run_with_apex():
    """Which the answer is about, also where another method comes first."""
    short = {"max_duration": "10ba"}
    runs = [
        make_run("hft", {"cc": PLAIN}, settings={"algorithms.hft.share": 0.5, **short}),
        make_run("short", {"cc": PLAIN}, settings=short),
        *pair(),
    ]
    assert answer(runs).baselines == ("vanilla",)


def test_every_algorithm_of_the_package_is_known_as_a_method():
    """Without its name here, its runs would pass for conventional baselines."""
    found = distribution("apex-composer").entry_points.select(group="llmfoundry_algorithms")
    assert {f"algorithms.{one.name}" for one in found} == {*METHODS} - {"model.peft_config"}
