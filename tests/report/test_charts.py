from dataclasses import replace

import pytest
from example_report import example_answer, example_run, two_runs

from apex_composer.report import charts
from apex_composer.report.run import Curve


def test_a_difference_is_that_of_equal_batches_and_interpolated_between_others():
    one = Curve([1, 2, 3], [10, 20, 30], [3.0, 2.0, 1.5])
    other = Curve([1, 3], [10, 30], [2.0, 1.0])
    found = charts.difference(one, other)
    assert list(found.tokens) == [10, 20, 30] and list(found.values) == [1.0, 0.5, 0.5]
    assert list(charts.difference(one, Curve([2], [20], [2.0])).tokens) == [20]


def test_runs_are_compared_with_the_baseline_of_their_seed():
    groups = {
        name: [example_run(name, seed=seed) for seed in seeds]
        for name, seeds in {"vanilla": (1, 2), "apex": (2, 3)}.items()
    }
    axis = charts.make_axis(example_answer(groups))
    first, second = (run.folder for run in groups["vanilla"])
    own = [run.folder for run in groups["apex"]]
    assert axis.baselines == {own[0]: second, own[1]: first}
    assert axis.styles == {first: 0, second: 0, own[0]: 1, own[1]: 1}


def test_stages_begin_where_their_tokens_are():
    axis = charts.make_axis(example_answer(two_runs()))
    assert axis.label == "tokens trained (k)"
    assert list(axis.boundaries) == pytest.approx([66 * 2.048, 133 * 2.048])


def test_every_chart_of_a_pair_of_runs():
    compared = example_answer(two_runs())
    axis, runs = charts.make_axis(compared), charts.runs_of(compared)
    assert [c.title for c in charts.training_charts(axis, runs)] == [
        "Training loss",
        "Learning rate",
    ]
    total, *domains = charts.validation_charts(axis, compared)
    assert total.title == "Validation loss: total" and "Diamonds" in total.note
    assert [c.title for c in domains] == ["Validation loss: arxiv", "Validation loss: github"]
    assert len(list(charts.operator_charts(axis, runs))) == 7
    assert "seconds" in charts.step_chart(axis, runs).svg
    assert len(list(charts.spread_charts(runs[1]))) == 2
    assert [c.title for c in charts.rank_charts(compared)][0] == "Effective rank: q_proj"
    assert charts.mean_ranks(runs[1])["q_proj"] == {"before.json": 107.5}


def test_what_was_logged_once_or_never_is_no_curve():
    run = replace(
        example_run("one"),
        validation={"arxiv": Curve([9], [9], [1.0])},
        metrics={},
        step_seconds=[],
    )
    compared = example_answer({"one": [run]})
    axis = charts.make_axis(compared)
    assert set(charts.validation_charts(axis, compared)) == {None}
    assert (
        list(charts.operator_charts(axis, [run])) == [] and charts.step_chart(axis, [run]) is None
    )
    assert list(charts.training_charts(axis, [run]))[1] is None


def test_batches_stand_below_where_the_tokens_of_a_run_are_unknown():
    groups = two_runs()
    (run,) = groups["vanilla"]
    groups["vanilla"] = [replace(run, loss=replace(run.loss, tokens=[]))]
    compared = example_answer(groups)
    axis = charts.make_axis(compared)
    assert axis.label == "batches trained" and list(axis.boundaries) == [66, 133]
    loss = next(charts.training_charts(axis, charts.runs_of(compared)))
    assert "batches trained" in loss.svg and "minus the baseline" in loss.note
