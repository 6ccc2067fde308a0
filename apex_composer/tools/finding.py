"""What `apex-composer doctor` finds, and the table of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Column, Table

_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "failure": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `absent` is what may be left out."""

    check: str
    status: Literal["ok", "absent", "warning", "failure"]
    text: str


def make_table(findings: Iterable[Finding]) -> Table:
    """The findings as a table."""
    table = Table("check", "", Column("found", overflow="fold"))
    for finding in findings:
        status = f"[{_STYLES[finding.status]}]{finding.status}"
        table.add_row(finding.check, status, escape(finding.text))
    return table
