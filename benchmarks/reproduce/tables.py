"""Tables of text, for a terminal or for a page, and how numbers stand in them."""

from collections.abc import Sequence
from typing import NamedTuple

from reproduce.comparisons import as_ratio
from rich.table import Table as RichTable

from apex_composer.report.estimates import Estimate

NOTHING = "–"


class Table(NamedTuple):
    """Cells of text, the first column of which names the rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def show(found: Estimate | None) -> str:
    """`+0.00120 ± 0.00030`, `0` where all are equal in every bit; a loss, above 1, as `3.1000`."""
    if found is None:
        return NOTHING
    if not any(found.values):
        return "0"
    form = ".4f" if found.mean > 1 else "+.5f"
    half = "" if found.high is None else f" ± {found.high - found.mean:{form.strip('+')}}"
    return f"{found.mean:{form}}{half}".replace("-", "−")


def show_percent(nats: Estimate) -> str:
    """The ratio of perplexities minus one: `+0.12 % (−0.03 to +0.27)`."""
    ratio = as_ratio(nats)
    mean, low, high = (
        None if value is None else f"{100 * (value - 1):+.2f}"
        for value in (ratio.mean, ratio.low, ratio.high)
    )
    text = f"{mean} %" if low is None else f"{mean} % ({low} to {high})"
    return text.replace("-", "−")


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
