"""The picture of a comparison: perplexity by method, and against what each method holds."""

from collections.abc import Sequence
from pathlib import Path

from apex_composer.compare.table import Row
from apex_composer.data_prep.atomic_files import new_file

# Blue and vermillion of Okabe and Ito, and grey: apart for every kind of colour vision.
OTHERS, APEX, FULL = "#0072B2", "#D55E00", "0.5"


def plot_rows(path: Path, rows: Sequence[Row], base: str = "base") -> None:
    """Draw every method's held-out perplexity with its seeds' spread, and its bytes beside it.

    Args:
        path: image file; its suffix names the format.
        rows: those of `make_rows`.
        base: name of the row of the untrained model, whose perplexity would squeeze all others; it
            is said in the title.
    """
    from matplotlib.figure import Figure

    shown = sorted((r for r in rows if r.method != base), key=lambda r: -r.mean_perplexity)
    figure = Figure(figsize=(11, 1.5 + 0.28 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(shown):
        colour = APEX if row.method.startswith("apex") else OTHERS
        ends = min(row.perplexity), max(row.perplexity)
        left.plot(ends, (place, place), color=colour, linewidth=2)
        left.plot(row.perplexity, [place] * len(row.perplexity), "|", color=colour)
        left.plot(row.mean_perplexity, place, "o", color=colour)
        held = row.optimizer_bytes / 1e6, row.method_bytes / 1e6
        right.barh(place, held[0], color=colour)
        right.barh(place, held[1], left=held[0], color=colour, alpha=0.4)
        if row.method == "full":
            left.axvline(row.mean_perplexity, color=FULL, linestyle=":", linewidth=1)
    left.set_yticks(range(len(shown)), [row.method for row in shown])
    left.set_xlabel("held-out perplexity (mean and seeds; lower is better; dotted: full)")
    right.set_xlabel("MB held: optimizer (dark), method (light)")
    for axes in (left, right):
        axes.grid(alpha=0.2)
    before = [f"; base {row.mean_perplexity:.3f}" for row in rows if row.method == base]
    figure.suptitle(f"Instruction tuning of the base model of make train{''.join(before)}")
    with new_file(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix.removeprefix("."))
