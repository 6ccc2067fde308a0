"""Read the documents of RedPajama's releases one by one, with bounded memory.

A bad record is reported and skipped; a damaged file is an error that names the file and the place.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from apex_composer.data_prep.errors import Rejected, SourceError
from apex_composer.data_prep.read.lines import (
    EXCERPT_BYTES,
    Line,
    open_lines,
    read_range,
)
from apex_composer.data_prep.read.parquet import Row, read_rows
from apex_composer.data_prep.read.records import (
    BROKEN_JSON,
    CUT_SHORT,
    TOO_LONG,
    parse_line,
    take_document,
)
from apex_composer.data_prep.read.remote import local_copy
from apex_composer.data_prep.read.sources import Source

# Reading a line of this size takes 600 MB at worst (one character beyond U+FFFF makes all take four
# bytes, twice), which leaves a worker within 1 GB.
LINE_LIMIT = 64_000_000

OnReject = Callable[[int, str, str, str | None], None]
Place = TypeVar("Place", Line, Row)


class Document(NamedTuple):
    """One document.

    Args:
        line: its line or row, counted from 1 where reading began.
        domain: its domain.
        text: its text, not blank.
        stop: bytes of the stream up to the end of its line; 0 in parquet.
    """

    line: int
    domain: str
    text: str
    stop: int = 0


def read_documents(
    source: Source,
    start: int,
    stop: int | None,
    on_reject: OnReject,
    *,
    on_end: Callable[[int], None] = lambda lines: None,
    line_limit: int = LINE_LIMIT,
    cache: Path | None = None,
) -> Iterator[Document]:
    """Read the documents of a source in order.

    Args:
        source: from find_sources.
        start: byte; only lines that start at it or later are read. 0 unless splittable.
        stop: byte; only lines that start before it are read, None for all. None unless splittable.
        on_reject: called with line, reason (one of records.REASONS), the record's beginning and
            its domain (None where it shows none) for every bad record; blank lines are no records.
        on_end: called with the number of lines or rows, blank ones too. Default: not called.
        line_limit: bytes of a line at most, longer ones are rejected. Default: 64,000,000.
        cache: folder for the download of a remote source. Default: the system's.

    Raises:
        SourceError: the file cannot be read, is no archive, or is damaged or cut short.
        ValueError: a byte range of a source that cannot be split.
    """
    if not source.splittable and (start, stop) != (0, None):
        raise ValueError(
            f"{source.path} cannot be split: start={start}, stop={stop} must be 0 and None."
        )
    with _fetched(source, cache) as path:
        if source.path.endswith(".parquet"):
            yield from _read_parquet(path, source, on_reject, on_end, line_limit)
            return
        number = 0
        with _opened(path, source) as stream:
            for line in _guarded(read_range(stream, start, stop, line_limit), source):
                number = line.number
                if line.content.isspace() and line.is_whole:
                    continue
                try:
                    domain, text = _take_line(line, source)
                except Rejected as rejected:
                    _report(on_reject, number, rejected, line.content, source)
                else:
                    yield Document(number, domain, text, line.offset + len(line.content))
        on_end(number)


def _take_line(line: Line, source: Source) -> tuple[str, str]:
    if not line.is_whole:
        raise Rejected(TOO_LONG)
    try:
        record = parse_line(line.content)
    except Rejected as rejected:
        if str(rejected) == BROKEN_JSON and not line.content.endswith(b"\n"):
            raise Rejected(CUT_SHORT) from None
        raise
    return take_document(record, source.format, source.domain)


def _read_parquet(
    path: Path,
    source: Source,
    on_reject: OnReject,
    on_end: Callable[[int], None],
    line_limit: int,
) -> Iterator[Document]:
    number = 0
    for row in _guarded(read_rows(path, line_limit), source):
        number = row.number
        try:
            if row.reason:
                raise Rejected(row.reason)
            domain, text = take_document(row.record, source.format, source.domain)
        except Rejected as rejected:
            _report(on_reject, number, rejected, str(row.record).encode(), source)
        else:
            yield Document(number, domain, text)
    on_end(number)


def _report(
    on_reject: OnReject, line: int, rejected: Rejected, content: bytes, source: Source
) -> None:
    excerpt = content[:EXCERPT_BYTES].decode("utf-8", "replace").strip()
    on_reject(line, str(rejected), excerpt, rejected.domain or source.domain)


@contextmanager
def _fetched(source: Source, cache: Path | None) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_copy(source.path, cache))
        except OSError as error:
            raise SourceError(f"{source.path} cannot be fetched: {error}") from error
        yield path


@contextmanager
def _opened(path: Path, source: Source) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open_lines(path))
        except (EOFError, OSError) as error:
            raise SourceError(f"{source.path} cannot be opened: {error}") from error
        yield stream


def _guarded(places: Iterator[Place], source: Source) -> Iterator[Place]:
    """Pass lines or rows on and turn what goes wrong in reading them into a SourceError.

    Only reading: an error of the caller, such as a full disk, must not be blamed on the input.
    """
    place: Place | None = None
    while True:
        try:
            place = next(places)
        except StopIteration:
            return
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise SourceError(
                f"{source.path} cannot be read {_describe(place, source)}: {error}. "
                "The file is damaged or cut short: fetch or compress it again."
            ) from error
        yield place


def _describe(place: Line | Row | None, source: Source) -> str:
    if place is None:
        return "at its beginning"
    if isinstance(place, Row):
        return f"after row {place.number}"
    if source.splittable:
        return f"after the line at byte {place.offset}"
    return f"after line {place.number}"
