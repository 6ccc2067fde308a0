"""Curves of several runs on the same axes, each run in its own colour."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.report.answers import Answer
from apex_composer.report.drawing import Line, draw, in_units, thin, visible
from apex_composer.report.run import Curve, Run

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
        names: of each run.
        styles: number of the line style of each run: its group's.
        baselines: the run that each run is compared with: of the same seed, if there is one.
        by_tokens: whether it counts tokens; batches where the tokens of some run are unknown.
        size: tokens of one unit of the axis.
        label: text below.
        boundaries: where a stage of some run begins, and the run's style; None where the stages of
            all runs that have any begin there.
    """

    names: Mapping[Path, str]
    styles: Mapping[Path, int]
    baselines: Mapping[Path, Path]
    by_tokens: bool
    size: float
    label: str
    boundaries: Sequence[tuple[float, int | None]]


def make_axis(answer: Answer) -> Axis:
    """An axis for the curves of all runs; the groups' order gives their styles."""
    runs = runs_of(answer)
    kept = [run for run in runs if len(run.loss.values)]
    curves = [curve for run in runs for curve in _curves(run)]
    by_tokens = all(len(curve.tokens) == len(curve.values) for curve in curves)
    # A data loader that does not count tokens leaves zeros.
    by_tokens = by_tokens and all(any(run.loss.tokens) for run in kept)
    most = max((c.tokens[-1] for c in curves if len(c.tokens)), default=0) if by_tokens else 0
    size, unit = in_units(most)
    label = f"{'tokens' if by_tokens else 'batches'} trained{f' ({unit})' if unit else ''}"
    styles = {run.folder: n for n, group in enumerate(answer.groups) for run in group.runs}
    begun = {run.folder: _begun(run, by_tokens, size) for run in kept if run.stages}
    boundaries = {(place, styles[run]) for run, places in begun.items() for place in places}
    if len(set(begun.values())) == 1:
        boundaries = {(place, None) for place, _ in boundaries}
    names = {run.folder: run.name for run in runs}
    return Axis(names, styles, _compared_with(answer), by_tokens, size, label, sorted(boundaries))


def _begun(run: Run, by_tokens: bool, size: float) -> tuple[float, ...]:
    """Where a run's stages begin, but the first."""
    places = _places(run.loss, by_tokens)
    batches = [stage.batch for stage in run.stages[1:]]
    return tuple(float(place) / size for place in np.interp(batches, run.loss.batches, places))


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
    noisy: bool = False,
    bands: bool = False,
    differences: bool = False,
    **more: Any,
) -> Chart | None:
    """Draw a curve of each run, and below them their differences to the baseline's.

    Args:
        curves: by the run's folder; those of one number are left out.
        y_label: text beside the curves.
        noisy: whether there is a value of every batch, see `thin`. Default: False.
        bands: whether noisy curves get bands. Default: False.
        differences: whether they are drawn. Default: False.
        more: for `draw`.

    Returns:
        None where no run has a curve.
    """
    drawn = {
        run: replace(curve, tokens=_places(curve, axis.by_tokens))
        for run, curve in curves.items()
        if np.count_nonzero(np.isfinite(curve.values)) > 1
    }
    if not drawn:
        return None
    bands = bands and len(drawn) <= MOST_BANDS
    panels, y_labels = [_lines(axis, drawn, noisy, bands)], [y_label]
    notes = _reading_notes(panels[0], drawn.values(), bands)
    pairs = {run: axis.baselines.get(run) for run in drawn} if differences else {}
    below = {r: difference(drawn[r], drawn[b]) for r, b in pairs.items() if b in drawn}
    below = {run: curve for run, curve in below.items() if np.isfinite(curve.values).any()}
    if below:
        panels.append(_lines(axis, below, noisy))
        y_labels.append("difference")
        notes.append("Below: minus the baseline.")
    limits = [visible(lines) for lines in panels]
    notes += [_outside(lines) for lines, own in zip(panels, limits, strict=True) if own]
    notes += [_left_out(axis, run, curve) for run, curve in curves.items()]
    given = {"x_label": axis.label, "boundaries": axis.boundaries, "y_labels": y_labels} | more
    svg = draw(title, panels, label=f"{title}, over the {axis.label}", limits=limits, **given)
    return Chart(title, svg, " ".join(filter(None, notes)))


def _reading_notes(lines: Sequence[Line], curves: Iterable[Curve], bands: bool) -> list[str]:
    """How to read curves of fewer points than values."""
    counts = [np.count_nonzero(np.isfinite(curve.values)) for curve in curves]
    if all(len(line.x) == count for line, count in zip(lines, counts, strict=True)):
        return []
    told = ["Each point is a mean of neighbouring values."]
    return [*told, "Bands: the lowest and the highest of them."] if bands else told


def _outside(lines: Sequence[Line]) -> str:
    edges = [line.y if edge is None else edge for line in lines for edge in (line.low, line.high)]
    every = np.concatenate(edges)
    return (
        f"Cut off above or below: all values lie between {every.min():.4g} and {every.max():.4g}."
    )


def _left_out(axis: Axis, run: Path, curve: Curve) -> str:
    count = len(curve.values) - np.count_nonzero(np.isfinite(curve.values))
    return (
        f"{axis.names[run]}: {count} of {len(curve.values)} values are no number." if count else ""
    )


def _lines(
    axis: Axis, curves: Mapping[Path, Curve], noisy: bool, bands: bool = False
) -> list[Line]:
    return [
        thin(
            np.asarray(curve.tokens, dtype=float) / axis.size,
            curve.values,
            axis.styles[run],
            noisy=noisy,
            band=bands,
        )
        for run, curve in curves.items()
    ]


def difference(curve: Curve, baseline: Curve) -> Curve:
    """A curve minus another one, where both have been; the other is interpolated between values.

    Of runs that saw the same batches it is free of the batches' own noise. What is no number has
    none.
    """
    tokens, values = np.asarray(curve.tokens, dtype=float), np.asarray(curve.values, dtype=float)
    both = (tokens >= baseline.tokens[0]) & (tokens <= baseline.tokens[-1]) & np.isfinite(values)
    other = np.interp(tokens[both], baseline.tokens, baseline.values)
    return Curve(np.asarray(curve.batches)[both], tokens[both], values[both] - other)


def runs_of(answer: Answer) -> list[Run]:
    """All runs, group by group."""
    return [run for group in answer.groups for run in group.runs]
