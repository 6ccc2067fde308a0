"""Results of a campaign: a line of JSON for each run, which says all that it depends on."""

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reproduce.scales import Scale

Record = dict[str, Any]


def as_json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def protocol(scale: Scale) -> dict[str, Any]:
    """Of a scale what changes a result; numbers of seeds and of workers do not."""
    return as_json(
        {k: v for k, v in scale.facts().items()
         if k not in ("workers", "duration") and not k.endswith("seeds")}
    )  # fmt: skip


def diverged_file(out: Path) -> Path:
    """Where the runs are listed that have no result, since their loss became no finite number."""
    return out.with_suffix(f".diverged{out.suffix}")


def read(path: Path) -> list[Record]:
    """All whole lines of a file; none where there is no file.

    A last line without its end is what a killed campaign left: it is dropped, and said.

    Raises:
        ValueError: where any other line is no JSON.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if rest:
        print(f"{path}: the last line is not whole and does not count", file=sys.stderr)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: {error}. Remove this line: its run is done again"
            ) from error
    return records


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines and wait until the disk has them; a torn last line is cut off before.

    Of two processes one waits for the other, whose unfinished line is not a torn one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
        text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def key(record: Record) -> tuple[Any, ...]:
    """What makes two results the same: text, scale, base and arm with all settings, and seed."""
    settings = json.dumps([record["scale"], record["settings"]], sort_keys=True)
    return record["texts"], record["base"], record["arm"], record["seed"], settings


def done(records: Sequence[Record]) -> set[tuple[Any, ...]]:
    """The keys of all results."""
    return {key(record) for record in records}
