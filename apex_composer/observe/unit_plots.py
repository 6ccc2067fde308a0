"""Pictures of activations and of masking, from those parts of `observe.json`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_composer.observe.drawing import (
    add_legend,
    label_layers,
    line_handles,
    line_style,
    log_if_wide,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]

UNITS = {"head": "heads", "channel": "channels"}
# What is masked, in the order of the damage.
_SIDES = ("lowest", "random", "top")
# Bands of channels in a map: enough to see where the strong ones end.
_BANDS = 60


def plot_units(activations: Mapping[str, Any], unit: str, title: str) -> "Figure":
    """Maps of layer by unit: mean norm over the layer's mean, and score per sample.

    Heads stand where they are. A layer has thousands of channels, so each row is sorted, norms on a
    logarithmic axis: the sharper a layer, the sooner its row fades. Channels share bands, which
    show their mean.

    Args:
        activations: that part of the results.
        unit: `head` or `channel`.
        title: name of the model.
    """
    groups = [one for one in activations["groups"].values() if one["unit"] == unit]
    figure = new_figure(11, 1.8 + 0.16 * max(len(groups), 6))
    figure.get_layout_engine().set(wspace=0.06)
    left, right = figure.subplots(1, 2, sharey=True)
    norms = [np.asarray(one["mean_norm"], float) for one in groups]
    relative = [own / own.mean() if own.any() else own for own in norms]
    scores = [np.asarray(one["score"], float) / activations["samples"] for one in groups]
    _draw_map(left, groups, relative, unit, "viridis", "norm / layer's mean")
    _draw_map(right, groups, scores, unit, "PuOr", "score per sample (eq. 3)")
    left.set_ylabel("layer")
    left.invert_yaxis()
    figure.suptitle(f"{UNITS[unit].capitalize()} of {title}: {activations['samples']:,} samples")
    return figure


def _draw_map(
    axes: "Axes",
    groups: Sequence[Results],
    rows: Sequence[np.ndarray],
    unit: str,
    colours: str,
    label: str,
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    norms = colours == "viridis"
    if unit == "channel":
        rows, edges = _bands([np.sort(row)[::-1] for row in rows], widening=norms)
        axes.set_xscale("log" if norms else "linear")
        axes.set_xlabel(
            f"channel's place in its layer, highest {'norm' if norms else 'score'} first"
        )
    else:
        edges = np.arange(max(map(len, rows)) + 1) - 0.5
        axes.set_xlabel("head")
        axes.xaxis.get_major_locator().set_params(integer=True)
    image = np.full((len(rows), len(edges) - 1), np.nan)
    for place, row in enumerate(rows):
        image[place, : len(row)] = row
    scale = Normalize(-1, 1)
    if norms:
        positive = image[image > 0]
        ends = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        scale = LogNorm(max(ends[0], ends[1] / 1e4), ends[1] * (1 + 1e-9))
    heights = np.arange(len(rows) + 1) - 0.5
    mesh = axes.pcolormesh(edges, heights, image, cmap=colours, norm=scale, rasterized=True)
    axes.set_yticks(*_layer_ticks(groups))
    axes.figure.colorbar(mesh, ax=axes, label=label)


def _bands(rows: Sequence[np.ndarray], *, widening: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Means over bands of places, equal ones or those that widen, and their edges, from 1."""
    length, spaced = max(map(len, rows)), np.geomspace if widening else np.linspace
    edges = np.unique(spaced(1, length + 1, _BANDS + 1).round().astype(int))
    starts = [edges[:-1][edges[:-1] <= len(row)] - 1 for row in rows]
    counts = [np.diff(np.append(own, len(row))) for own, row in zip(starts, rows, strict=True)]
    sums = [np.add.reduceat(row, own) for own, row in zip(starts, rows, strict=True)]
    return [total / count for total, count in zip(sums, counts, strict=True)], edges.astype(float)


def _layer_ticks(groups: Sequence[Results]) -> tuple[list[int], list[str]]:
    step = -(-len(groups) // 16)
    places = list(range(0, len(groups), step))
    return places, [str(groups[place]["layer"]) for place in places]


def plot_deviations(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Standard deviation of the units' mean norms by layer, a line for each model (paper, fig. 1).

    Args:
        found: `activations` by the name of the model.
    """
    present = [
        unit
        for unit in UNITS
        if any(own["unit"] == unit for one in found.values() for own in one["groups"].values())
    ]
    figure = new_figure(5.5 * len(present), 3.8)
    for axes, unit in zip(np.atleast_1d(figure.subplots(1, len(present))), present, strict=True):
        for place, one in enumerate(found.values()):
            own = [group for group in one["groups"].values() if group["unit"] == unit]
            axes.plot(
                [group["layer"] for group in own],
                [group["std"] for group in own],
                **line_style(place),
            )
        log_if_wide(axes)
        axes.set_title(UNITS[unit])
        axes.set_ylabel("standard deviation of mean norms")
        label_layers(axes)
    add_legend(figure, line_handles(list(found)))
    figure.suptitle("Deviation of activations (the higher, the fewer units do the work)")
    return figure


def plot_masking(rows: Sequence[Results], title: str) -> "Figure":
    """Perplexity, and exact match where there are answers, against the share that is masked.

    Args:
        rows: `masking` of the results.
        title: name of the model.
    """
    measures = {"perplexity": "perplexity"}
    if any(row["exact_match"] is not None for row in rows):
        measures["exact_match"] = "exact match"
    figure = new_figure(5.5 * len(measures), 3.8)
    whole = next((row for row in rows if row["which"] == "none"), None)
    for axes, (key, label) in zip(
        np.atleast_1d(figure.subplots(1, len(measures))), measures.items(), strict=True
    ):
        for place, which in enumerate(_SIDES):
            own = sorted((r for r in rows if r["which"] == which), key=lambda row: row["share"])
            if own:
                shares = [100 * row["share"] for row in own]
                axes.plot(shares, [row[key] for row in own], **line_style(place))
        if whole is not None:
            axes.axhline(whole[key], color="0.4", linestyle=":")
        axes.set_xlabel("masked units, % of each group")
        axes.set_ylabel(label)
        if key == "perplexity":
            log_if_wide(axes)
    add_legend(figure, line_handles(_SIDES, **{"nothing masked": ":"}))
    figure.suptitle(f"Masking units of {title}")
    return figure
