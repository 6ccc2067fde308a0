"""The charts of a report: curves of several runs on the same axes, each run in its own colour."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from apex_composer.report.answers import TOTAL, Answer
from apex_composer.report.crossings import validation_curve
from apex_composer.report.drawing import COLOURS, Line, draw, in_units, thin
from apex_composer.report.run import Curve, Run

OPERATOR_NORM, LEARNING_RATE = "apex/operator_norm/", "lr-"
# Layers that get a dot each.
MOST_DOTS = 12
# More bands than these would hide one another.
MOST_BANDS = 4


@dataclass(frozen=True)
class Chart:
    """A picture with its words.

    Attributes:
        title: what is drawn.
        svg: an element for the page.
        note: how to read it.
    """

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """What all curves over tokens share. A run is known by its folder.

    Attributes:
        styles: number of the line style of each run: its group's.
        baselines: the run that each run is compared with: of the same seed, if there is one.
        by_tokens: whether it counts tokens; batches where the tokens of some run are unknown.
        size: tokens of one unit of the axis.
        label: text below.
        boundaries: where a stage of some run begins.
    """

    styles: Mapping[Path, int]
    baselines: Mapping[Path, Path]
    by_tokens: bool
    size: float
    label: str
    boundaries: Sequence[float]


def make_axis(answer: Answer) -> Axis:
    """An axis for the curves of all runs; the groups' order gives their styles."""
    runs = [run for group in answer.groups for run in group.runs]
    kept = [run for run in runs if len(run.loss.values)]
    curves = [curve for run in runs for curve in _curves(run)]
    by_tokens = all(len(curve.tokens) == len(curve.values) for curve in curves)
    most = max((run.loss.tokens[-1] for run in kept), default=0) if by_tokens else 0
    size, unit = in_units(most)
    begun = {
        float(np.interp(stage.batch, run.loss.batches, _places(run.loss, by_tokens))) / size
        for run in kept
        for stage in run.stages[1:]
    }
    label = f"{'tokens' if by_tokens else 'batches'} trained{f' ({unit})' if unit else ''}"
    styles = {run.folder: n for n, group in enumerate(answer.groups) for run in group.runs}
    return Axis(styles, _compared_with(answer), by_tokens, size, label, sorted(begun))


def _curves(run: Run) -> list[Curve]:
    return [run.loss, *run.validation.values(), *run.metrics.values()]


def _places(curve: Curve, by_tokens: bool) -> Sequence[int]:
    """Where a curve's values stand on the axis."""
    return curve.tokens if by_tokens else curve.batches


def _compared_with(answer: Answer) -> dict[Path, Path]:
    baseline = next((g for g in answer.groups if g.name in answer.baselines[:1]), None)
    if baseline is None:
        return {}
    own = dict(zip(baseline.seeds, baseline.runs, strict=True))
    return {
        run.folder: own.get(seed, baseline.runs[0]).folder
        for group in answer.groups
        if group is not baseline
        for seed, run in zip(group.seeds, group.runs, strict=True)
    }


def compare_curves(
    axis: Axis,
    title: str,
    curves: Mapping[Path, Curve],
    *,
    y_label: str = "nats per token",
    bands: bool = False,
    differences: bool = False,
    **more: Any,
) -> Chart | None:
    """Draw a curve of each run, and below them their differences to the baseline's.

    Args:
        curves: by the run's folder; those of one value are left out.
        y_label: text beside the curves.
        bands: whether the curves are dense and get bands. Default: False.
        differences: whether they are drawn. Default: False.
        more: for `draw`.

    Returns:
        None where no run has a curve.
    """
    drawn = {
        run: replace(curve, tokens=_places(curve, axis.by_tokens))
        for run, curve in curves.items()
        if len(curve.values) > 1
    }
    if not drawn:
        return None
    bands = bands and len(drawn) <= MOST_BANDS
    panels, y_labels, notes = [_lines(axis, drawn, bands)], [y_label], []
    if any(
        len(line.x) < len(curve.values)
        for line, curve in zip(panels[0], drawn.values(), strict=True)
    ):
        notes.append("Each point is a mean of neighbouring values.")
        notes += ["Bands: the lowest and the highest of them."] * bands
    pairs = {run: axis.baselines.get(run) for run in drawn}
    below = {r: difference(drawn[r], drawn[b]) for r, b in pairs.items() if b in drawn}
    if differences and below:
        panels.append(_lines(axis, below))
        y_labels.append("difference")
        notes.append("Below: minus the baseline.")
    given = {"x_label": axis.label, "boundaries": axis.boundaries, "y_labels": y_labels} | more
    svg = draw(title, panels, label=f"{title}, over the {axis.label}", **given)
    return Chart(title, svg, " ".join(notes))


def _lines(axis: Axis, curves: Mapping[Path, Curve], bands: bool = False) -> list[Line]:
    return [
        thin(np.asarray(c.tokens, dtype=float) / axis.size, c.values, axis.styles[run], band=bands)
        for run, c in curves.items()
    ]


def difference(curve: Curve, baseline: Curve) -> Curve:
    """A curve minus another one, where both have been; the other is interpolated between values.

    Of runs that saw the same batches it is free of the batches' own noise.
    """
    tokens, values = np.asarray(curve.tokens, dtype=float), np.asarray(curve.values, dtype=float)
    both = (tokens >= baseline.tokens[0]) & (tokens <= baseline.tokens[-1])
    other = np.interp(tokens[both], baseline.tokens, baseline.values)
    return Curve(np.asarray(curve.batches)[both], tokens[both], values[both] - other)


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
        chart = compare_curves(axis, title, curves, differences=True, **reached)
        if chart is not None and reached.get("points"):
            told = "Diamonds: the baseline's last loss (dashed) is reached."
            chart = replace(chart, note=f"{told} {chart.note}".strip())
        yield chart


def _reached(axis: Axis, answer: Answer, domain: str) -> dict[str, Any]:
    """The loss that the first baseline ends with, and the points where other runs reach it."""
    found = [r for r in answer.reaches if r.domain == domain and r.baseline in answer.baselines[:1]]
    styles = {group.name: number for number, group in enumerate(answer.groups)}
    crossings = [(styles[reach.group], crossing) for reach in found for crossing in reach.crossings]
    if not crossings or not axis.by_tokens:
        return {}
    points = [(c.tokens / axis.size, c.target, s) for s, c in crossings if c.tokens is not None]
    return {"level": crossings[0][1].target, "points": points}


def runs_of(answer: Answer) -> list[Run]:
    """All runs, group by group."""
    return [run for group in answer.groups for run in group.runs]


def training_charts(axis: Axis, runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Loss and learning rate."""
    loss = {run.folder: run.loss for run in runs}
    yield compare_curves(axis, "Training loss", loss, bands=True, differences=True)
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
    return compare_curves(axis, "Step time", curves, y_label="seconds")


def spread_charts(run: Run) -> Iterator[Chart]:
    """Standard deviation of the units' mean activation norms by layer, a line for each stage."""
    for unit in ("head", "channel"):
        lines = []
        for stage in run.stages:
            groups = [name for name, kind in stage.units.items() if kind == unit]
            values = [stage.norm_std[name] for name in groups if name in stage.norm_std]
            if values:
                lines.append(_layers(range(len(values)), values, stage.number))
        if lines:
            title = f"Standard deviation of {unit} norms"
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
