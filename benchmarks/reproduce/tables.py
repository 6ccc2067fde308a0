"""Tables of text, for a terminal or for a page, and how numbers stand in them."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table as RichTable

from apex_composer.report.estimates import Estimate

NOTHING = "–"
DIVERGED = "diverged"
_BEYOND = "beyond all numbers"


class Table(NamedTuple):
    """Cells of text, the first column of which names the rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def show(found: Estimate | None) -> str:
    """A difference: `+0.00120 ± 0.00030`, `0` where all are equal in every bit."""
    return _show(found, "+.5f", zero="0")


def show_loss(found: Estimate | None) -> str:
    """A loss: `3.1000 ± 0.0200`."""
    return _show(found, ".4f", zero=None)


def _show(found: Estimate | None, form: str, zero: str | None) -> str:
    if found is None:
        return NOTHING
    if not math.isfinite(found.mean):
        return DIVERGED
    if zero is not None and not any(found.values):
        return zero
    half = "" if found.high is None else f" ± {found.high - found.mean:{form.strip('+')}}"
    return f"{found.mean:{form}}{half}".replace("-", "−")


def show_percent(nats: Estimate) -> str:
    """The ratio of perplexities minus one: `+0.12 % (−0.03 to +0.27)`."""
    if not math.isfinite(nats.mean):
        return DIVERGED
    if not any(nats.values):
        return "0"
    mean, low, high = map(_percent, (nats.mean, nats.low, nats.high))
    mean = mean if mean == _BEYOND else f"{mean} %"
    return mean if low is None else f"{mean} ({low} to {high})"


def _percent(nats: float | None) -> str | None:
    """exp(nats) - 1 in percent."""
    if nats is None:
        return None
    if nats > math.log(sys.float_info.max) - 5:
        return _BEYOND
    value = 100 * math.expm1(nats)
    return (f"{value:+.2f}" if value < 1e6 else f"{value:+.2g}").replace("-", "−")


def show_commit(commit: str | None) -> str:
    """Its beginning, and whether the tracked files differed from it (`gpu/machine.py`)."""
    if commit is None:
        return "unknown"
    return f"{commit[:7]} with changes" if commit.endswith("+changes") else commit[:7]


def markdown(table: Table) -> str:
    """A table for a page, without its title."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{table.note}" if table.note else text


def for_terminal(table: Table) -> RichTable:
    """A table that rich prints."""
    drawn = RichTable(title=table.title, caption=table.note, title_justify="left")
    for place, name in enumerate(table.head):
        drawn.add_column(name, justify="left" if place == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
