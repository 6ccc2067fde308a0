import re
from dataclasses import replace
from math import inf, nan

import pytest
from example_report import example_answer, example_run, two_runs

from apex_composer.report.charts import training_charts
from apex_composer.report.curves import compare_curves, difference, make_axis, runs_of
from apex_composer.report.run import Curve


def test_a_difference_is_that_of_equal_batches_and_interpolated_between_others():
    one = Curve([1, 2, 3], [10, 20, 30], [3.0, 2.0, 1.5])
    other = Curve([1, 3], [10, 30], [2.0, 1.0])
    found = difference(one, other)
    assert list(found.tokens) == [10, 20, 30] and list(found.values) == [1.0, 0.5, 0.5]
    assert list(difference(one, Curve([2], [20], [2.0])).tokens) == [20]


def test_runs_are_compared_with_the_baseline_of_their_seed():
    groups = {
        name: [example_run(name, seed=seed) for seed in seeds]
        for name, seeds in {"vanilla": (1, 2), "apex": (2, 3)}.items()
    }
    axis = make_axis(example_answer(groups))
    first, second = (run.folder for run in groups["vanilla"])
    own = [run.folder for run in groups["apex"]]
    assert axis.baselines == {own[0]: second, own[1]: first}
    assert axis.styles == {first: 0, second: 0, own[0]: 1, own[1]: 1}


def test_stages_begin_where_their_tokens_are():
    axis = make_axis(example_answer(two_runs()))
    assert axis.label == "tokens trained (k)"
    assert axis.boundaries == [
        (pytest.approx(66 * 2.048), None),
        (pytest.approx(133 * 2.048), None),
    ]


def test_batches_stand_below_where_the_tokens_of_a_run_are_unknown():
    groups = two_runs()
    (run,) = groups["vanilla"]
    groups["vanilla"] = [replace(run, loss=replace(run.loss, tokens=[]))]
    compared = example_answer(groups)
    axis = make_axis(compared)
    assert axis.label == "batches trained" and axis.boundaries == [(66, None), (133, None)]
    loss = next(training_charts(axis, runs_of(compared)))
    assert "batches trained" in loss.svg and "minus the baseline" in loss.note


def test_stages_of_runs_that_begin_apart_have_their_runs_colours():
    groups = two_runs() | {"two": [example_run("two", stages=2)]}
    axis = make_axis(example_answer(groups))
    assert [style for _, style in axis.boundaries] == [1, 2, 1]
    (chart, _) = training_charts(axis, runs_of(example_answer(groups)))
    assert chart.svg.count("stroke-dasharray: 0.9,2.2") == 6  # on both panels


def test_batches_stand_below_where_a_loader_counts_no_tokens():
    (run,) = two_runs()["apex"]
    zeros = replace(run.loss, tokens=[0] * len(run.loss.values))
    axis = make_axis(example_answer({"apex": [replace(run, loss=zeros)]}))
    assert axis.label == "batches trained"


def curves_of(*values):
    """An axis of a baseline and another run, and their curves."""
    compared = example_answer({"base": [example_run("base")], "other": [example_run("other")]})
    tokens = [2048 * place for place in range(len(values[0]))]
    runs = [run.folder for run in runs_of(compared)]
    curves = {
        run: Curve(range(len(own)), tokens, own) for run, own in zip(runs, values, strict=True)
    }
    return make_axis(compared), curves


def test_what_is_no_number_is_left_out_and_told():
    axis, curves = curves_of([3.0, 2.0, inf, 1.0], [3.0, nan, inf, 0.5])
    chart = compare_curves(axis, "Loss", curves, differences=True)
    assert "base: 1 of 4 values are no number." in chart.note
    assert "other: 2 of 4 values are no number." in chart.note
    assert "nan" not in chart.svg and "inf" not in chart.svg
    axis, curves = curves_of([nan] * 4, [nan, nan, nan, 1.0])
    assert compare_curves(axis, "Loss", curves) is None  # not an empty box


def test_runs_that_were_never_at_the_same_place_have_no_panel_of_differences():
    axis, curves = curves_of([3.0, 2.0], [3.0, 2.0])
    first, second = curves
    curves[second] = Curve([8, 9], [8 * 2048, 9 * 2048], [1.0, 0.5])
    chart = compare_curves(axis, "Loss", curves, differences=True)
    assert "Below" not in chart.note and ">difference<" not in chart.svg


def test_one_value_that_is_far_off_hides_no_others_and_is_told():
    values = [3.0 - 0.01 * place for place in range(100)]
    axis, curves = curves_of(values, [*values[:50], 1e30, *values[51:]])
    chart = compare_curves(axis, "Loss", curves, differences=True)
    assert "between 2.01 and 1e+30" in chart.note
    assert re.search(r">2\.\d+<", chart.svg) and "1e" not in re.findall(r">([^<]*)<", chart.svg)
    axis, curves = curves_of(values, values)
    assert "Cut off" not in compare_curves(axis, "Loss", curves, differences=True).note
