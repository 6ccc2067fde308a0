"""Pictures of ranks and of what training changed, from those parts of `observe.json`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_composer.observe.drawing import (
    add_legend,
    draw_panels,
    line_handles,
    line_style,
    of_projection,
    projections,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_ranks(found: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Effective ranks by layer, a panel for each projection and a line for each model or stage.

    Args:
        found: `ranks` by the name of the model.
    """
    weights = {name: one["weights"] for name, one in found.items()}

    def draw(axes: "Axes", projection: str) -> None:
        for place, own in enumerate(weights.values()):
            entries = of_projection(own, projection)
            layers = [entry["layer"] for entry in entries]
            style = line_style(place)
            full = [100 / min(entry["shape"]) for entry in entries]
            for kind, line in (("entropy_rank", "-"), ("numerical_rank", ":")):
                shown = [entry[kind] * one for entry, one in zip(entries, full, strict=True)]
                axes.plot(layers, shown, **{**style, "linestyle": line})

    figure = draw_panels(projections(*weights.values()), draw, "% of full rank")
    add_legend(figure, line_handles(list(weights), entropy="-", numerical=":"))
    figure.suptitle("Effective ranks of the expanded weights")
    return figure


def plot_row_spaces(ranks: Mapping[str, Any], title: str) -> "Figure":
    """Ranks of W[P] and W[N], and the overlap of their row spaces beside that of random ones.

    Args:
        ranks: that part of the results.
        title: name of the model.
    """
    weights = {n: e for n, e in ranks["weights"].items() if e["row_space_overlap"] is not None}
    lines = {
        "entropy rank of W[P] / full": lambda e: _share(e, "advantageous"),
        "entropy rank of W[N] / full": lambda e: _share(e, "disadvantageous"),
        "overlap of row spaces": lambda e: e["row_space_overlap"],
        "overlap by chance": lambda e: e["overlap_by_chance"],
    }

    def draw(axes: "Axes", projection: str) -> None:
        entries = of_projection(weights, projection)
        layers = [entry["layer"] for entry in entries]
        for place, value in enumerate(lines.values()):
            axes.plot(layers, [value(entry) for entry in entries], **line_style(place))
        axes.set_ylim(-0.03, 1.03)

    figure = draw_panels(projections(weights), draw, "share")
    add_legend(figure, line_handles(list(lines)))
    figure.suptitle(f"Selected units of {title}: the assumptions of section 3.4")
    return figure


def _share(entry: Mapping[str, Any], side: str) -> float:
    return entry[f"{side}_entropy_rank"] / min(entry["selected_rows"], entry["shape"][1])


def plot_changes(delta: Mapping[str, Any], title: str) -> "Figure":
    """Relative change of each weight by layer, and that of its selected and unselected units.

    Args:
        delta: that part of the results.
        title: name of the model.
    """
    weights = {name: own for name, own in delta["weights"].items() if "singular_values" in own}
    lines = {
        "whole weight": "relative_change",
        "advantageous": "advantageous_change",
        "disadvantageous": "disadvantageous_change",
        "unselected": "unselected_change",
    }
    if all(own["unselected_change"] is None for own in weights.values()):
        lines = {"whole weight": "relative_change"}

    def draw(axes: "Axes", projection: str) -> None:
        entries = of_projection(weights, projection)
        layers = [entry["layer"] for entry in entries]
        for place, key in enumerate(lines.values()):
            values = [np.nan if entry[key] is None else 100 * entry[key] for entry in entries]
            axes.plot(layers, values, **line_style(place))

    figure = draw_panels(projections(weights), draw, "change, % of the base")
    add_legend(figure, line_handles(list(lines)))
    figure.suptitle(f"What training changed: {title} against {delta['base']}")
    return figure


def plot_singular_values(delta: Mapping[str, Any], title: str) -> "Figure":
    """The largest singular values of each change, over the first; a line for each layer.

    Args:
        delta: that part of the results.
        title: name of the model.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    weights = {name: own for name, own in delta["weights"].items() if "singular_values" in own}
    layers = [own["layer"] for own in weights.values()]
    scale = Normalize(min(layers), max(layers))

    def draw(axes: "Axes", projection: str) -> None:
        for entry in of_projection(weights, projection):
            values = np.asarray(entry["singular_values"])
            shown = np.unique(np.geomspace(1, len(values), 16).round().astype(int))
            if values[0] > 0:
                relative = values[shown - 1] / values[0]
                colour = colormaps["viridis"](scale(entry["layer"]))
                # Below 1e-6 there is float32's rounding alone.
                axes.plot(shown, np.where(relative > 1e-6, relative, np.nan), color=colour, lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("number of the singular value")

    figure = draw_panels(projections(weights), draw, "singular value / largest")
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=figure.axes, label="layer")
    figure.suptitle(f"Singular values of what training changed: {title} against {delta['base']}")
    return figure
