"""What the plots of observe have in common: figures, panels, lines and files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.data_prep.atomic_files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, apart for every kind of colour vision; lines differ by markers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, outside of pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: Path, figure: "Figure") -> Path:
    """Write a figure in its suffix's format, whole or not at all; equal figures are equal files."""
    from matplotlib import rc_context

    vector = path.suffix == ".svg"
    with rc_context({"svg.hashsalt": path.stem}), new_file(path) as file:
        figure.savefig(
            file,
            format=path.suffix.removeprefix("."),
            dpi=130,
            metadata={"Date": None} if vector else None,
        )
    return path


def line_style(place: int) -> dict[str, Any]:
    """Colour and marker of the line of a number, from 0."""
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


def line_handles(labels: Sequence[str], **dashes: str) -> list["Line2D"]:
    """Handles of a legend: a line for each label, and a grey one for each dash pattern."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **line_style(i)) for i, label in enumerate(labels)]
    return lines + [Line2D([], [], color="0.4", linestyle=d, label=n) for n, d in dashes.items()]


def add_legend(figure: "Figure", handles: Sequence["Line2D"]) -> None:
    """A legend below everything, as wide as its labels let it be."""
    longest = max(len(str(handle.get_label())) for handle in handles) + 8
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 11 / longest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def label_layers(axes: "Axes") -> None:
    """The horizontal axis of the layers: whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(alpha=0.2)


def log_if_wide(axes: "Axes") -> None:
    """A logarithmic vertical axis where the lines' positive values spread over a factor of 30."""
    values = [float(y) for line in axes.lines for y in line.get_ydata() if y is not None and y > 0]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("log")


def projections(*weights: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Projections of expanded weights, in the model's order."""
    return list(dict.fromkeys(entry["projection"] for own in weights for entry in own.values()))


def of_projection(
    weights: Mapping[str, Mapping[str, Any]], projection: str
) -> list[Mapping[str, Any]]:
    """Entries of one projection, by layer."""
    own = (entry for entry in weights.values() if entry["projection"] == projection)
    return sorted(own, key=lambda entry: entry["layer"])


def draw_panels(names: Sequence[str], draw: Callable[["Axes", str], None], label: str) -> "Figure":
    """A panel for each projection, four in a row, all with one vertical axis.

    Args:
        names: projections.
        draw: draws one of them.
        label: of the vertical axis.
    """
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.9 * columns + 0.6, 2.3 * rows + 1.0)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.remove()
            continue
        label_layers(axes)
        draw(axes, names[place])
        for line in axes.lines:  # of many layers, as many markers as can be told apart
            line.set_markevery(-(-len(line.get_xdata()) // 12))
        axes.set_title(names[place], fontsize="medium")
        if place % columns == 0:
            axes.set_ylabel(label)
    return figure
