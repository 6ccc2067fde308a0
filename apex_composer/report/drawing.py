"""Lines on axes as inline SVG, whose colours are the page's: readable on light and dark."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# Colours that matplotlib draws with, and the CSS variables that take their places in the SVG.
COLOURS = [f"#0a0b{number:02x}" for number in range(8)]
INK, FAINT = "#0a0c00", "#0a0c01"
VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS)}
VARIABLES |= {INK: "currentColor", FAINT: "var(--faint)"}
DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
# A curve gets at most so many points: one for two pixels of the widest chart.
MOST_POINTS = 240
LEAST_POINTS, BATCHES_PER_POINT = 30, 10
# An axis shows what is no further off than so many times the spread of nearly all values.
MOST_SPREAD = 5
# In CSS pixels. A chart is drawn for narrow screens and scaled up on wide ones.
WIDTH, HEIGHT = 400, 215
POINTS_PER_INCH = 72

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Line:
    """A curve on a chart.

    Attributes:
        x: where its values stand [n].
        y: its values [n].
        style: number of its colour and dashes.
        low: lower edge of its band [n]; none without.
        high: upper edge of its band [n].
        marked: whether each value gets a dot.
    """

    x: Numbers
    y: Numbers
    style: int
    low: Numbers | None = None
    high: Numbers | None = None
    marked: bool = False


def colour_and_dashes(style: int) -> tuple[int, int]:
    """Numbers of the colour and of the dashes of a style: every colour first without dashes."""
    return style % len(COLOURS), style // len(COLOURS) % len(DASHES)


def thin(x: Numbers, y: Numbers, style: int, *, noisy: bool = False, band: bool = False) -> Line:
    """A curve of few points: each is the mean of neighbours, the band their least and greatest.

    Args:
        x: rising [n].
        y: values [n]; those that are not finite are left out.
        style: see `Line`.
        noisy: whether it has the noise of single batches, which a mean of ten takes away. Default
            False: values stay as they are, as far as there is room.
        band: whether the line gets a band. Default: False.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    wanted = max(min(len(y), LEAST_POINTS), len(y) // BATCHES_PER_POINT) if noisy else len(y)
    count = min(MOST_POINTS, wanted)
    if not count:
        return Line((), (), style)
    starts = np.arange(count) * len(y) // count
    sizes = np.diff([*starts, len(y)])
    means = [np.add.reduceat(values, starts) / sizes for values in (x, y)]
    edges = [edge.reduceat(y, starts) if band else None for edge in (np.minimum, np.maximum)]
    return Line(*means, style, *edges, marked=count < 2)


def draw(
    name: str,
    panels: Sequence[Sequence[Line]],
    *,
    label: str,
    x_label: str,
    y_labels: Sequence[str],
    boundaries: Sequence[tuple[float, int | None]] = (),
    levels: Numbers = (),
    limits: Sequence[tuple[float, float] | None] = (),
    points: Sequence[tuple[float, float, int]] = (),
    whole_x: bool = False,
) -> str:
    """Draw lines as SVG for the inside of an HTML page.

    Args:
        name: of the chart, another one for each of a page: the SVG's identifiers begin with it.
        panels: lines of each axes, from above.
        label: what the chart shows, for those who do not see it.
        x_label: text below.
        y_labels: text beside each axes.
        boundaries: dotted vertical lines: where, and the style whose colour they have, or None.
        levels: heights of dashed lines across the first axes. Default: none.
        limits: lowest and highest value of each axes, see `visible`. Default: what is drawn.
        points: x, y and style of what is marked on the first axes.
        whole_x: whether only whole numbers stand below. Default: False.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 11,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        height = HEIGHT if len(panels) == 1 else 1.5 * HEIGHT
        size = WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        ratios = [2, *[1] * (len(panels) - 1)]
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)
        for axes, lines, text in zip(rows[:, 0], panels, y_labels, strict=True):
            _dress(axes, boundaries, whole_x)
            axes.set_ylabel(text)
            for line in lines:
                _draw_line(axes, line)
        first, last = rows[0, 0], rows[-1, 0]
        last.set_xlabel(x_label)
        if len(panels) > 1:
            last.axhline(0, color=INK, linewidth=0.8)
        for level in levels:
            first.axhline(level, color=INK, linewidth=1, dashes=(3, 3))
        for x, y, style in points:
            colour = COLOURS[colour_and_dashes(style)[0]]
            first.plot([x], [y], "D", color=colour, markersize=6, markeredgecolor=INK)
        for axes, own in zip(rows[:, 0], limits, strict=False):
            if own is not None:
                axes.set_ylim(*own)
        # Once, here: it would be done a second time when the file is written.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    return _inline(file.getvalue(), label)


def visible(lines: Sequence[Line]) -> tuple[float, float] | None:
    """What an axis must show where single values are so far off that they would hide the rest.

    Returns:
        Lowest and highest value of an axis; None where everything has its place.
    """
    values = np.concatenate([np.asarray(line.y, dtype=float) for line in lines])
    edges = [edge for line in lines for edge in (line.low, line.high) if edge is not None]
    every = np.concatenate([values, *edges])
    if len(values) < LEAST_POINTS:
        return None
    low, high = (np.quantile(values, q, method=m) for q, m in ((0.02, "higher"), (0.98, "lower")))
    room = MOST_SPREAD * (high - low)
    if not room or (every.min() >= low - room and every.max() <= high + room):
        return None
    inside = every[(every >= low - room) & (every <= high + room)]
    margin = 0.05 * (inside.max() - inside.min())
    return inside.min() - margin, inside.max() + margin


def _dress(axes: Any, boundaries: Sequence[tuple[float, int | None]], whole_x: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    # The grid says where the numbers stand.
    axes.tick_params(left=False, bottom=False, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_x, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(useOffset=False)
    for place, style in boundaries:
        colour = INK if style is None else COLOURS[colour_and_dashes(style)[0]]
        axes.axvline(place, color=colour, linewidth=0.9, alpha=0.7, dashes=(1, 2.5))


def _draw_line(axes: Any, line: Line) -> None:
    colour, dashes = colour_and_dashes(line.style)
    if line.low is not None:
        axes.fill_between(line.x, line.low, line.high, color=COLOURS[colour], alpha=0.2, lw=0)
    look = {"marker": "o", "markersize": 3} if line.marked else {}
    (drawn,) = axes.plot(line.x, line.y, color=COLOURS[colour], linewidth=1.6, **look)
    if dashes:
        drawn.set_dashes(DASHES[dashes])


def _inline(svg: str, label: str) -> str:
    """An SVG file as an element of a page: without its head, of the page's width, colours, font."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    # Names that every figure has; those of clips and markers come from the figure's own name.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    # A tenth of a pixel is enough in tags; what stands between them is text.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return f'<svg role="img" aria-label="{escape(label)}" {box}>{svg}'


def in_units(most: float) -> tuple[float, str]:
    """The unit in which token counts up to `most` are written: its size and its name."""
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if most >= size:
            return size, name
    return 1.0, ""


def show_tokens(tokens: float) -> str:
    """A number of tokens for people: `1.23 M`."""
    if not math.isfinite(tokens):
        return "unknown"
    size, name = in_units(abs(tokens))
    return f"{tokens / size:.3g} {name}".strip() if size > 1 else f"{tokens:.0f}"
