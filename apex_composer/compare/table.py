"""From the runs' results to one row for each method; the table as CSV and as markdown."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apex_composer.demo.results import step_times

# The training loss is the mean over the last quarter of the batches: one batch alone says little.
LAST_BATCHES = 0.25
# What all are compared with, seed by seed: seeds differ by their data's order, which all share.
REFERENCE = "full"

Results = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """What the comparison says of a method.

    Args:
        method: its name in the YAML.
        note: of which other method these are the runs, or nothing.
        trained_share: what can move, over the base model's parameters.
        training_loss: nats per token of answers at the end of training, the seeds' mean.
        perplexity: on held-out answers, one for each seed.
        step_seconds: median, lower_quartile and upper_quartile over the batches of all seeds; None
            where a run has one batch.
        optimizer_bytes: moments and the like.
        method_bytes: what the method holds beside the model, its gradients and the optimizer.
    """

    method: str
    note: str
    trained_share: float
    training_loss: float
    perplexity: list[float]
    step_seconds: dict[str, float] | None
    optimizer_bytes: int
    method_bytes: int

    @property
    def mean_perplexity(self) -> float:
        """That of the seeds."""
        return statistics.fmean(self.perplexity)


def make_rows(results: Results, best_of: Mapping[str, Sequence[str]]) -> list[Row]:
    """One row for each method that has a result for every seed.

    Args:
        results: those of every method that has run, a result for each seed, in the table's order.
        best_of: of a method without runs of its own, those of which it is the best on the first
            seed. It is left out where one of them has no result.
    """
    rows = {method: make_row(method, own) for method, own in results.items() if own}
    for method, others in best_of.items():
        if all(other in rows for other in others):
            best = min(others, key=lambda other: rows[other].perplexity[0])
            rows[method] = make_row(method, results[best], f"= {best}")
    order = [*dict.fromkeys([*results, *best_of])]
    return [rows[method] for method in order if method in rows]


def make_row(method: str, results: Sequence[Mapping[str, Any]], note: str = "") -> Row:
    """Put the results of a method's seeds together; bytes and shares are those of the largest."""
    seconds = [second for result in results for second in result["step_seconds"]]
    return Row(
        method,
        note,
        max(result["trained_share"] for result in results),
        statistics.fmean(last_loss(result["training_loss"]) for result in results),
        [math.exp(result["held_out_loss"]) for result in results],
        step_times(seconds) if len(results[0]["step_seconds"]) > 1 else None,
        max(result["optimizer_bytes"] for result in results),
        max(result["method_bytes"] for result in results),
    )


def last_loss(losses: Sequence[float]) -> float:
    """The mean of the last quarter of the batches."""
    return statistics.fmean(losses[-max(1, round(LAST_BATCHES * len(losses))) :])


def differences(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Held-out loss minus that of the reference with the same seed, nats, by method; none without.

    Args:
        rows: those of `make_rows`.
    """
    reference = next((row.perplexity for row in rows if row.method == REFERENCE), None)
    if reference is None:
        return {}
    return {
        row.method: [math.log(o / f) for o, f in zip(row.perplexity, reference, strict=True)]
        for row in rows
    }


def as_csv(rows: Sequence[Row]) -> str:
    """All numbers in full, one line for each method."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    times = ("median", "lower_quartile", "upper_quartile")
    head = ("method", "note", "trained_share", "training_loss", "perplexity_mean")
    spread = ("perplexity_min", "perplexity_max", "seeds", *(f"step_seconds_{t}" for t in times))
    against = [f"against_{REFERENCE}_{kind}" for kind in ("mean", "min", "max")]
    writer.writerow([*head, *spread, "optimizer_bytes", "method_bytes", *against])
    found = differences(rows)
    for row in rows:
        values = [row.mean_perplexity, min(row.perplexity), max(row.perplexity)]
        seconds = [(row.step_seconds or dict.fromkeys(times, ""))[time] for time in times]
        first = [row.method, row.note, row.trained_share, row.training_loss, *values]
        bytes_held = [row.optimizer_bytes, row.method_bytes]
        own = found.get(row.method)
        compared = [statistics.fmean(own), min(own), max(own)] if own else [""] * 3
        writer.writerow([*first, len(row.perplexity), *seconds, *bytes_held, *compared])
    return file.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    head = ("method", "trained", "training loss", "held-out perplexity")
    columns = (
        *head,
        f"against {REFERENCE}, nats",
        "s / step (quartiles)",
        "optimizer MB",
        "method MB",
    )
    found = differences(rows)
    cells = (_cells(row, found.get(row.method)) for row in rows)
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row, against: Sequence[float] | None) -> list[str]:
    perplexity, seconds, compared = f"{row.mean_perplexity:.3f}", "-", "-"
    if against and row.method != REFERENCE:
        compared = f"{statistics.fmean(against):+.4f}"
        if len(against) > 1:
            compared += f" ({min(against):+.4f} to {max(against):+.4f})"
    if len(row.perplexity) > 1:
        perplexity += f" ({min(row.perplexity):.3f} to {max(row.perplexity):.3f})"
    if row.step_seconds is not None:
        median, low, high = row.step_seconds.values()
        seconds = f"{median:.3f} ({low:.3f} to {high:.3f})"
    return [
        f"{row.method} {row.note}".strip(),
        f"{100 * row.trained_share:.1f} %",
        f"{row.training_loss:.3f}",
        perplexity,
        compared,
        seconds,
        *(f"{size / 1e6:.2f}" for size in (row.optimizer_bytes, row.method_bytes)),
    ]
