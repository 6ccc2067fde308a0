"""Results of a benchmark: one list of lines, for the table and for the JSON file alike."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("part", "what", "found", "target", "met")
_MET = {True: "yes", False: "NO", None: ""}


class Report:
    """Lines of one part, saved after each of them, so that a crash loses none.

    Args:
        part: which script.
        path: of the JSON file; None keeps the lines in memory.

    Attributes:
        lines: dictionaries with `part`, `what`, `found` (text), `target` (text), `met` (None
            where there is nothing to meet) and the numbers behind them.
        facts: what holds for the part as a whole.
        complete: whether the part came to its end.
    """

    def __init__(self, part: str, path: Path | None = None):
        self.part, self.path = part, path
        self.lines: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.complete = False

    def add(
        self, what: str, found: str, target: str = "", met: bool | None = None, **numbers: Any
    ) -> None:
        """One line of the table."""
        line = {"part": self.part, "what": what, "found": found, "target": target, "met": met}
        self.lines.append(line | numbers)
        self.save()

    def finish(self) -> None:
        """Nothing is missing."""
        self.complete = True
        self.save()

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "part": self.part,
            "complete": self.complete,
            "facts": self.facts,
            "lines": self.lines,
        }

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            write_json(self.path, self.as_dict())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's content; None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def failed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines whose target is missed."""
    return [line for line in lines if line["met"] is False]


def print_table(lines: Sequence[dict[str, Any]], title: str) -> None:
    """By rich, or as plain columns where it is not installed."""
    rows = [[*(str(line[name]) for name in COLUMNS[:-1]), _MET[line["met"]]] for line in lines]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(rows, title)
        return
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        # A Text would do as well; markup in square brackets must not be taken out of shapes.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    # Files and pipes have no width: without one, columns would be folded to 80 characters.
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _print_plain(rows: list[list[str]], title: str) -> None:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    print(title)
    for row in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
