"""The charts of a report: what is drawn of the runs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from apex_composer.report.answers import TOTAL, Answer
from apex_composer.report.crossings import validation_curve
from apex_composer.report.curves import Axis, Chart, compare_curves, runs_of
from apex_composer.report.drawing import COLOURS, Line, draw
from apex_composer.report.finals import same_text
from apex_composer.report.maps import UNITS
from apex_composer.report.run import Curve, Run

OPERATOR_NORM, LEARNING_RATE = "apex/operator_norm/", "lr-"
# Layers that get a dot each.
MOST_DOTS = 12


def validation_charts(axis: Axis, answer: Answer) -> Iterator[Chart | None]:
    """Validation losses, and where runs reach what the baseline ends with; the total first."""
    for domain in sorted(answer.domains, key=lambda name: name != TOTAL):
        curves = {}
        for run in runs_of(answer):
            curve = validation_curve(run, domain)
            if curve is not None:
                curves[run.folder] = curve
        title = f"Validation loss: {domain}"
        reached = _reached(axis, answer, domain)
        own = _of_same_text(axis, answer, domain)
        chart = compare_curves(own, title, curves, differences=True, **reached)
        if chart is not None and reached.get("points"):
            told = "Diamonds: the baseline's last loss (dashed) is reached."
            chart = replace(chart, note=f"{told} {chart.note}".strip())
        yield chart


def _of_same_text(axis: Axis, answer: Answer, domain: str) -> Axis:
    """The axis, without the baseline of runs that evaluate other text than it."""
    baseline = [group for group in answer.groups if group.name in answer.baselines[:1]]
    same = [g for g in answer.groups if all(same_text(g, other, domain) for other in baseline)]
    kept = {run.folder for group in same for run in group.runs}
    return replace(axis, baselines={r: b for r, b in axis.baselines.items() if r in kept})


def _reached(axis: Axis, answer: Answer, domain: str) -> dict[str, Any]:
    """The loss that the first baseline ends with, and the points where other runs reach it."""
    found = [r for r in answer.reaches if r.domain == domain and r.baseline in answer.baselines[:1]]
    styles = {group.name: number for number, group in enumerate(answer.groups)}
    crossings = [(styles[reach.group], crossing) for reach in found for crossing in reach.crossings]
    if not crossings or not axis.by_tokens:
        return {}
    points = [(c.tokens / axis.size, c.target, s) for s, c in crossings if c.tokens is not None]
    return {"levels": sorted({c.target for _, c in crossings}), "points": points}


def training_charts(axis: Axis, runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Loss and learning rate."""
    loss = {run.folder: run.loss for run in runs}
    yield compare_curves(axis, "Training loss", loss, noisy=True, bands=True, differences=True)
    rates = {}
    for run in runs:
        names = sorted(name for name in run.metrics if name.startswith(LEARNING_RATE))
        if names:
            rates[run.folder] = run.metrics[names[0]]
    yield compare_curves(axis, "Learning rate", rates, y_label="learning rate")


def operator_charts(axis: Axis, runs: Sequence[Run]) -> Iterator[Chart | None]:
    """How large the operators' part of the weights is, a chart for each projection."""
    names = {name for run in runs for name in run.metrics if name.startswith(OPERATOR_NORM)}
    for name in sorted(names):
        curves = {run.folder: run.metrics[name] for run in runs if name in run.metrics}
        title = f"Operator norm: {name.removeprefix(OPERATOR_NORM)}"
        yield compare_curves(axis, title, curves, y_label="|T W[P]| / |W[N]|")


def step_chart(axis: Axis, runs: Sequence[Run]) -> Chart | None:
    """Durations of the batches."""
    curves = {}
    for run in runs:
        count = min(len(run.step_seconds), len(run.loss.values))
        given = run.loss.batches[:count], run.loss.tokens[:count], run.step_seconds[:count]
        curves[run.folder] = Curve(*given)
    return compare_curves(axis, "Step time", curves, noisy=True, y_label="seconds")


def spread_charts(run: Run) -> Iterator[Chart]:
    """Standard deviation of the units' mean activation norms by layer, a line for each stage."""
    for unit, word in UNITS.items():
        lines = []
        for stage in run.stages:
            groups = [name for name, kind in stage.units.items() if kind == unit]
            values = [stage.norm_std.get(name, math.nan) for name in groups]
            if np.isfinite(values).any():
                lines.append(_layers(range(len(values)), values, stage.number))
        if lines:
            title = f"Standard deviation of {word} norms"
            yield _by_layer(f"{run.folder} {title}", title, lines, "std of mean norms")


def rank_charts(answer: Answer) -> Iterator[Chart]:
    """Effective rank of the expanded weights by layer, for each projection.

    A run has the colour of its group, and its observations have their dashes in their order.
    """
    parts: dict[str, list[Line]] = {}
    for style, group in enumerate(answer.groups):
        for run in group.runs:
            for place, projections in enumerate(ranks_of(run).values()):
                for projection, layers in projections.items():
                    x = sorted(layers)
                    line = _layers(
                        x, [layers[n] for n in x], style % len(COLOURS) + place * len(COLOURS)
                    )
                    parts.setdefault(projection, []).append(line)
    for projection, lines in parts.items():
        title = f"Effective rank: {projection}"
        yield _by_layer(title, title, lines, "entropy-based rank")


def ranks_of(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    """Entropy-based effective ranks by observation, projection and layer."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for file, observed in run.observations.items():
        for weight in observed.get("ranks", {}).get("weights", {}).values():
            layers = found.setdefault(file, {}).setdefault(weight["projection"], {})
            layers[weight["layer"]] = weight["entropy_rank"]
    return found


def mean_ranks(run: Run) -> dict[str, dict[str, float]]:
    """The mean of `ranks_of` over the layers, by projection and observation."""
    means: dict[str, dict[str, float]] = {}
    for file, projections in ranks_of(run).items():
        for projection, layers in projections.items():
            means.setdefault(projection, {})[file] = fmean(layers.values())
    return means


def _layers(x: Sequence[int], values: Sequence[float], style: int) -> Line:
    return Line(x, values, style, marked=len(x) <= MOST_DOTS)


def _by_layer(name: str, title: str, lines: Sequence[Line], y_label: str) -> Chart:
    given = {"x_label": "layer", "y_labels": [y_label], "whole_x": True}
    return Chart(title, draw(name, [lines], label=f"{title}, by layer", **given))
