from dataclasses import replace

from example_report import example_answer, example_run, two_runs

from apex_composer.report import charts
from apex_composer.report.curves import make_axis, runs_of
from apex_composer.report.run import Curve


def test_every_chart_of_a_pair_of_runs():
    compared = example_answer(two_runs())
    axis, runs = make_axis(compared), runs_of(compared)
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


def test_no_difference_is_drawn_between_losses_on_different_text():
    groups = two_runs()
    vanilla, apex = (groups[name][0] for name in groups)
    apex = replace(apex, validation_tokens=apex.validation_tokens | {"github": 9})
    compared = example_answer(dict(zip(groups, ([vanilla], [apex]), strict=True)))
    drawn = charts.validation_charts(make_axis(compared), compared)
    told = {chart.title.split(": ")[1]: "minus the baseline" in chart.note for chart in drawn}
    assert told == {"total": False, "arxiv": True, "github": False}


def test_what_was_logged_once_or_never_is_no_curve():
    run = replace(
        example_run("one"),
        validation={"arxiv": Curve([9], [9], [1.0])},
        metrics={},
        step_seconds=[],
    )
    compared = example_answer({"one": [run]})
    axis = make_axis(compared)
    assert set(charts.validation_charts(axis, compared)) == {None}
    assert (
        list(charts.operator_charts(axis, [run])) == [] and charts.step_chart(axis, [run]) is None
    )
    assert list(charts.training_charts(axis, [run]))[1] is None
