"""All pictures of what `observe` measured, drawn from the content of `observe.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.observe.drawing import write_figure
from apex_composer.observe.unit_plots import UNITS, plot_deviations, plot_masking, plot_units
from apex_composer.observe.weight_plots import (
    plot_changes,
    plot_ranks,
    plot_row_spaces,
    plot_singular_values,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def write_plots(folder: Path, found: Mapping[str, Results], suffix: str = ".svg") -> list[Path]:
    """Draw everything that there are numbers for; maps, masking and changes of each model.

    Args:
        folder: where the pictures go.
        found: content of `observe.json` by the name of the model, several side by side.
        suffix: `.svg` or `.png`. Default: `.svg`.

    Returns:
        The files, in the order that they are to be looked at.
    """
    figures: dict[str, Figure] = {}
    have = {part: _having(found, part) for part in ("activations", "masking", "ranks", "delta")}
    if have["activations"]:
        figures["deviations"] = plot_deviations(have["activations"])
    if have["ranks"]:
        figures["ranks"] = plot_ranks(have["ranks"])
    for name, one in found.items():
        behind = "" if len(found) == 1 else f"-{name}"
        figures |= {f"{stem}{behind}": figure for stem, figure in _of_one(name, one).items()}
    return [write_figure(folder / f"{stem}{suffix}", figure) for stem, figure in figures.items()]


def _having(found: Mapping[str, Results], part: str) -> dict[str, Any]:
    return {name: one[part] for name, one in found.items() if one.get(part)}


def _of_one(name: str, one: Results) -> dict[str, "Figure"]:
    figures = {}
    for unit in UNITS:
        if any(group["unit"] == unit for group in _groups(one).values()):
            figures[f"{UNITS[unit]}"] = plot_units(one["activations"], unit, name)
    if one.get("masking"):
        figures["masking"] = plot_masking(one["masking"], name)
    weights = one.get("ranks", {}).get("weights", {})
    if any(entry["row_space_overlap"] is not None for entry in weights.values()):
        figures["row_spaces"] = plot_row_spaces(one["ranks"], name)
    if one.get("delta"):
        figures["changes"] = plot_changes(one["delta"], name)
        if any(entry.get("energy") for entry in one["delta"]["weights"].values()):
            figures["singular_values"] = plot_singular_values(one["delta"], name)
    return figures


def _groups(one: Results) -> Mapping[str, Any]:
    return one.get("activations", {}).get("groups", {})
