"""The picture of the two runs: losses above, their difference below."""

from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.atomic_files import new_file

# Blue and vermillion of Okabe and Ito: apart for every kind of colour vision, and in grey.
COLOURS = {"vanilla": "#0072B2", "apex": "#D55E00"}
CURVES = {"vanilla": ("vanilla", "-"), "apex": ("APEX", "--")}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with its neighbours; at the ends, with those that there are.

    Args:
        values: one number for each batch [n].
        window: number of batches in the average.
    """
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot_losses(path: Path, losses: dict[str, list[float]], summary: dict[str, Any]) -> None:
    """Draw both loss curves with the stage boundaries, and the difference between them.

    Args:
        path: image file; its suffix names the format.
        losses: per batch, of `vanilla` and `apex`, equally long, in nats per token.
        summary: content of `summary.json`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    batches = np.arange(1, len(losses["vanilla"]) + 1)
    window = max(1, len(batches) // 20)
    for run, (label, line) in CURVES.items():
        values = np.array(losses[run])
        above.plot(batches, values, color=COLOURS[run], alpha=0.2, linewidth=0.8)
        total = summary[f"{run}_ppl"]["total"]
        above.plot(
            batches,
            smooth(values, window),
            line,
            color=COLOURS[run],
            label=f"{label} (validation perplexity {total:.3f})",
        )
    _draw_difference(below, batches, losses, window)
    for axes in (above, below):
        for stage in summary["stages"][1:]:
            axes.axvline(stage["start_batch"] + 0.5, color="0.5", linestyle=":", linewidth=1)
        axes.grid(alpha=0.2)
    above.set_ylabel("training loss (nats per token)")
    above.legend()
    below.set_xlabel("batch of continued pre-training (dotted: a new stage begins)")
    base = summary["base_ppl"]["total"]
    figure.suptitle(f"Continued pre-training from a base of validation perplexity {base:.3f}")
    with new_file(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix.removeprefix("."))


def _draw_difference(
    axes: Any, batches: np.ndarray, losses: dict[str, list[float]], window: int
) -> None:
    """Both runs see the same batches, so their difference is free of the batches' own noise."""
    difference = np.array(losses["apex"]) - np.array(losses["vanilla"])
    axes.plot(batches, difference, color="black", alpha=0.2, linewidth=0.8)
    axes.plot(batches, smooth(difference, window), color="black")
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_ylabel("APEX - vanilla")
