"""Maps of a stage's units, layer by layer: their scores, and which of them are selected.

Colours are mixed with the page's own by their opacity, so that they are right on light and dark.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apex_composer.report.run import Run, Stage

# In the order of the page, and their names there.
UNITS = {"head": "head", "kv_head": "KV head", "channel": "channel"}
# Blue and orange of Okabe and Ito: apart for every kind of colour vision.
HIGH, LOW = (0x00, 0x7A, 0xC2), (0xE0, 0x6C, 0x00)
# More units than these share a column with their neighbours.
MOST_COLUMNS = 64
# Steps of opacity on each side of zero: fewer make the file smaller.
SHADES = 12


@dataclass(frozen=True)
class Map:
    """A picture of the units of all layers: a row for each layer, the first one above.

    Attributes:
        title: what its colours show.
        image: PNG as a data URI, a pixel for each layer and column.
        rows: number of layers.
        columns: of units, or of neighbours that share one.
        units: in a layer.
        word: for one of them.
        largest: score of the strongest colour; None where the map is of what is selected.
        plus: SVG path of the marks of advantageous units; empty where columns are shared.
        minus: the same of the disadvantageous ones.
    """

    title: str
    image: str
    rows: int
    columns: int
    units: int
    word: str
    largest: float | None
    plus: str = ""
    minus: str = ""


def stage_maps(stage: Stage, unit: str) -> list[Map]:
    """The maps of a stage for one of `UNITS`: scores, where there are, and what is selected.

    Single columns have scores and marks in one map; shared ones, a map of each.
    """
    groups = [name for name, kind in stage.units.items() if kind == unit]
    counts = [_count(stage, name) for name in groups]
    if not any(counts):
        return []
    selected = [_selected(stage, *one) for one in zip(groups, counts, strict=True)]
    columns = min(max(counts), MOST_COLUMNS)
    plus = minus = ""
    if columns == max(counts):
        plus, minus = (_marks(stage, groups, side) for side in ("plus", "minus"))
    shown = []
    if stage.scores is not None and set(groups) <= set(stage.scores):
        scores = [_centred(stage.scores[name]) for name in groups]
        shown.append(_map("scores", unit, scores, columns, plus, minus))
    if not shown or not plus:
        shown.append(_map("selected", unit, selected, columns, plus, minus))
    return shown


def _count(stage: Stage, group: str) -> int:
    """Units of a group; up to the last selected one without scores: KV heads go by query heads."""
    if stage.scores is not None and group in stage.scores:
        return len(stage.scores[group])
    return 1 + max([*stage.advantageous[group], *stage.disadvantageous[group]], default=-1)


def _selected(stage: Stage, group: str, count: int) -> np.ndarray:
    """1 for advantageous units, -1 for disadvantageous ones [count]."""
    values = np.zeros(count)
    values[list(stage.advantageous[group])] = 1
    values[list(stage.disadvantageous[group])] = -1
    return values


def _centred(scores: Sequence[float]) -> np.ndarray:
    """Scores minus their layer's mean: that of ranks is 0 already, that of average norms is not."""
    values = np.asarray(scores, dtype=float)
    finite = np.isfinite(values)
    return np.where(finite, values - values[finite].mean(), 0) if finite.any() else 0 * finite


def _map(
    kind: str, unit: str, layers: Sequence[np.ndarray], columns: int, plus: str, minus: str
) -> Map:
    units, word = max(map(len, layers)), UNITS[unit]
    values = np.stack([_shared(layer, units, columns) for layer in layers])
    title = f"scores of {word}s" if kind == "scores" else f"selected {word}s"
    largest = float(np.abs(values).max()) if kind == "scores" else None
    return Map(title, _image(values), *values.shape, units, word, largest, plus, minus)


def _shared(values: np.ndarray, units: int, columns: int) -> np.ndarray:
    """Means of neighbours [columns]; a layer of fewer units than others ends with nothing."""
    values = np.pad(values, (0, units - len(values)))
    starts = np.arange(columns) * units // columns
    return np.add.reduceat(values, starts) / np.diff([*starts, units])


def _image(values: np.ndarray) -> str:
    """Blue above zero, orange below, the more opaque the further from it."""
    import matplotlib.image

    largest = np.abs(values).max() or 1.0
    shade = np.rint(SHADES * np.abs(values) / largest) / SHADES
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(values[..., None] > 0, HIGH, LOW)
    pixels[..., 3] = np.rint(255 * shade)
    pixels[shade == 0] = 0
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _marks(stage: Stage, groups: Sequence[str], sign: str) -> str:
    """A plus or a minus at the centre of the cell of every selected unit."""
    chosen = stage.advantageous if sign == "plus" else stage.disadvantageous
    shape = "h.6m-.3-.3v.6" if sign == "plus" else "h.6"
    return "".join(
        f"M{unit + 0.2:.1f} {layer + 0.5:.1f}{shape}"
        for layer, group in enumerate(groups)
        for unit in chosen[group]
    )


def overlaps(run: Run) -> list[tuple[int, str, float, float]]:
    """Stage, unit, and the mean overlap of the advantageous and the disadvantageous sets."""
    rows = []
    for stage in run.stages:
        for unit, word in UNITS.items():
            pairs = [pair for name, pair in stage.overlap.items() if stage.units[name] == unit]
            if pairs:
                rows.append((stage.number, word, *map(float, np.mean(pairs, axis=0))))
    return rows
