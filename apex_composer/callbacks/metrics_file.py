"""The file of `local_metrics`: lines of JSON that survive a kill, a resumption and a full disk.

A line has `kind` and `batch`, the batches trained when it was written: `start` (of a process),
`settings`, `batch`, `evaluation`, `stage`, `lost` (lines that a full disk took). A start at a batch
supersedes what was written later than it; a start at 0 all. Numbers that JSON does not have are
texts: `NaN`, `Infinity`, `-Infinity`.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import PARTIAL, new_file

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"
LOSS = "loss/train/total"
START, SETTINGS, BATCH, EVALUATION, STAGE, LOST = (
    "start",
    "settings",
    "batch",
    "evaluation",
    "stage",
    "lost",
)
# Characters of a line without its metrics, and of a number with what stands around it.
LINE, NUMBER = 180, 28

Line = dict[str, Any]


class MetricsFile:
    """Appends lines, each by one write, and thins the file when it has grown to a limit.

    What cannot be written does not end the training: a warning says so once, lines of batches are
    counted and the others kept; when there is room again, these and a line `lost` are written.

    Args:
        path: of the file; goes on where an earlier process has stopped, without its torn line.
        limit: bytes that thinning keeps it below, see `thin`.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, limit: int):
        self.path, self.limit = path, limit
        path.parent.mkdir(parents=True, exist_ok=True)
        for torn in path.parent.glob(f"{path.name}{PARTIAL}*"):  # a kill while it was thinned
            torn.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = _cut_torn(self._file)
        self._thin_at = limit
        self._waiting: list[bytes] = []
        self._lost: Line | None = None

    def append(self, line: Line) -> None:
        """Write one line with what is waiting, or keep or count it where that fails."""
        text = encode(line)
        if not self._write(self._pending() + text):
            self._keep(line, text)
        elif self._size > self._thin_at:
            self._thin()

    def close(self) -> None:
        """Try once more to write what is waiting, and say what is lost."""
        pending = self._pending()
        if pending and not self._write(pending):
            log.warning("local_metrics: %s lacks lines, there was no room for them", self.path)
        os.close(self._file)

    def _pending(self) -> bytes:
        # Never a part of it by itself: on a disk that is almost full, each batch would find room
        # for the short line `lost` and none for its own.
        lost = [] if self._lost is None else [encode(self._lost)]
        return b"".join([*lost, *self._waiting])

    def _keep(self, line: Line, text: bytes) -> None:
        if line["kind"] != BATCH:
            self._waiting.append(text)
            return
        if self._lost is None:
            self._lost = {"kind": LOST, "batch": line["batch"], "first": line["batch"], "lines": 0}
        self._lost |= {"batch": line["batch"], "lines": self._lost["lines"] + 1}

    def _write(self, text: bytes) -> bool:
        try:
            written = os.write(self._file, text)
        except OSError as error:
            self._warn(error)
            return False
        if written < len(text):  # the disk filled up within the line
            with suppress(OSError):  # then the next line is damaged, too, and counted as such
                os.ftruncate(self._file, self._size)
            self._warn("no space left")
            return False
        self._size += written
        self._lost, self._waiting = None, []
        return True

    def _warn(self, error: Any) -> None:
        if self._lost is None and not self._waiting:
            log.warning(
                "local_metrics: cannot write to %s (%s). Training goes on; numbers of batches are "
                "lost until there is room, and the file will say which. Make room.",
                self.path,
                error,
            )

    def _thin(self) -> None:
        try:
            lines, _ = read_lines(self.path)
            with new_file(self.path) as file:
                file.write(b"".join(map(encode, thin(lines, self.limit // 2))))
            thinned = os.open(self.path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            log.warning("local_metrics: %s cannot be made smaller (%s)", self.path, reason)
        else:
            os.close(self._file)
            self._file, self._size = thinned, os.fstat(thinned).st_size
        # What is never thinned may have outgrown the limit: not at every line then.
        self._thin_at = max(self.limit, 2 * self._size)


def encode(line: Line) -> bytes:
    """One line of the file; what JSON does not know becomes text."""
    options: Any = {"separators": (",", ":"), "default": str, "allow_nan": False}
    try:
        text = json.dumps(line, **options)
    except ValueError:
        text = json.dumps(_without_nan(line), **options)
    return text.encode() + b"\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_without_nan, value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_number(value: Any) -> float | None:
    """The number of a metric as `encode` wrote it; None where it is a text."""
    if isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None


def _cut_torn(file: int) -> int:
    """Remove the bytes after the last end of a line; the size that is left."""
    size = end = os.fstat(file).st_size
    while end:
        begin = max(0, end - 65536)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        end = begin + found + 1 if found >= 0 else begin
        if found >= 0:
            break
    if end < size:
        os.ftruncate(file, end)
    return end


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The lines that no later start supersedes, and how many are damaged.

    A last line without its end was torn by a kill, or is being written: it is not counted.

    Raises:
        OSError: the file cannot be read.
    """
    lines: list[Line] = []
    damaged = 0
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                break
            line = _decode(text)
            if line is None:
                damaged += 1
                continue
            if line["kind"] == START:
                start = line["batch"]
                lines = [own for own in lines if own["batch"] <= start] if start else []
            lines.append(line)
    return lines, damaged


def _decode(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    known = isinstance(line, dict) and isinstance(line.get("kind"), str)
    return line if known and isinstance(line.get("batch"), int) else None


def thin(lines: Sequence[Line], room: int) -> list[Line]:
    """Fewer batches, so that the lines need no more than `room` bytes.

    Only lines of batches lose something. Of each metric the first and the last value are kept,
    and the first in each of N equal spans of batches, N being what there is room for; loss and
    duration get two fifths of the room to themselves, so that more of them are left.

    Args:
        room: bytes, of which other lines are taken off first.
    """
    batches = [line for line in lines if line["kind"] == BATCH]
    room -= sum(len(encode(line)) for line in lines if line["kind"] != BATCH)
    found: dict[str, list[int]] = {}
    for line in batches:
        for name in _names(line):
            found.setdefault(name, []).append(line["batch"])
    most_lines = max(16, int(0.4 * room) // (LINE + NUMBER))
    most_values = max(16, int(0.6 * room) // max(1, sum(len(name) + NUMBER for name in found)))
    kept = {name: _spread(own, most_values) for name, own in found.items()}
    clocks = _spread([line["batch"] for line in batches], most_lines)
    thinned = []
    for line in lines:
        if line["kind"] != BATCH:
            thinned.append(line)
            continue
        own = _only(line, kept, line["batch"] in clocks)
        if own is not None:
            thinned.append(own)
    return thinned


def _names(line: Line) -> set[str]:
    """Of a line's metrics but the loss, which goes by the line."""
    return {*line.get("during", ()), *line.get("metrics", ())} - {LOSS}


def _spread(batches: Sequence[int], most: int) -> set[int]:
    """About `most` of them (rising), evenly, the first and the last included."""
    if len(batches) <= most:
        return set(batches)
    first, width = batches[0], (batches[-1] - batches[0]) / most
    kept = {int((batch - first) / width): batch for batch in reversed(batches)}
    return {*kept.values(), batches[-1]}


def _only(line: Line, kept: dict[str, set[int]], clock: bool) -> Line | None:
    """A line with the metrics that are kept; None where nothing of it is."""
    batch = line["batch"]
    parts = {
        part: {n: v for n, v in line.get(part, {}).items() if n == LOSS or batch in kept[n]}
        for part in ("during", "metrics")
    }
    if not clock and not parts["metrics"] and not parts["during"].keys() - {LOSS}:
        return None
    return {**line, **parts}
