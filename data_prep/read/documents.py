"""Read the documents of RedPajama's releases one by one, with bounded memory.

A bad record is reported and skipped; a damaged file is an error that names the file and the place.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apex_composer.data_prep.errors import Rejected, SourceError, UnfitError
from apex_composer.data_prep.read.arrow import read_arrow
from apex_composer.data_prep.read.lines import EXCERPT_BYTES, Line, open_lines, read_range
from apex_composer.data_prep.read.parquet import Row, read_rows
from apex_composer.data_prep.read.records import take_document
from apex_composer.data_prep.read.remote import local_copy
from apex_composer.data_prep.read.sources import Source

# Reading a line of this size takes 600 MB at worst (one character beyond U+FFFF makes all take four
# bytes, twice), which leaves a worker within 1 GB.
LINE_LIMIT = 64_000_000

OnReject = Callable[[int, str, str, str | None], None]
Record = TypeVar("Record", Line, Row)
Opened = TypeVar("Opened")
Taken = TypeVar("Taken")


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
        source: one of `find_sources`.
        start: byte; only lines that start at it or later are read. 0 unless splittable.
        stop: byte; only lines that start before it are read, None for all. None unless splittable.
        on_reject: called with line, reason (one of those in records), the record's beginning and
            its domain (None where it shows none) for every bad record; blank lines are no records.
        on_end: called with the number of lines or rows, blank ones too. Default: not called.
        line_limit: bytes of a line at most, longer ones are rejected. Default: 64,000,000.
        cache: folder for the download of a remote source. Default: the system's.

    Raises:
        SourceError: the file cannot be read, is no archive, or is damaged or cut short.
    """

    def take(record: dict[str, Any]) -> tuple[str, str]:
        return take_document(record, source.format, source.domain)

    options = {"on_end": on_end, "line_limit": line_limit, "cache": cache}
    for number, (domain, text), end in read_records(
        source, start, stop, take, on_reject, **options
    ):
        yield Document(number, domain, text, end)


def read_records(
    source: Source,
    start: int,
    stop: int | None,
    take: Callable[[dict[str, Any]], Taken],
    on_reject: OnReject,
    *,
    on_end: Callable[[int], None] = lambda lines: None,
    line_limit: int = LINE_LIMIT,
    cache: Path | None = None,
) -> Iterator[tuple[int, Taken, int]]:
    """Read what is wanted of the records of a source, in order, with `read_documents`' arguments.

    Args:
        take: called with every record; raises Rejected for a bad one.

    Yields:
        The number of a record, counted from 1 where reading began, what `take` took of it, and the
        bytes of the stream up to its end (0 in parquet).
    """
    assert source.splittable or (start, stop) == (0, None), source.path
    number = 0
    with ExitStack() as stack:
        path = _enter(stack, local_copy(source.path, cache), source, "fetched")
        if source.path.endswith(".parquet"):
            records = read_rows(path, line_limit, source.format)
        elif source.path.endswith(".arrow"):
            records = read_arrow(path, line_limit)
        else:
            stream = _enter(stack, open_lines(path), source, "opened")
            records = read_range(stream, start, stop, line_limit)
        for record in _guarded(records, source):
            number = record.number
            try:
                taken = take(record.parse())
            except Rejected as rejected:
                if record.is_blank:  # asked only here, where few come by
                    continue
                excerpt = record.content[:EXCERPT_BYTES].decode("utf-8", "replace").strip()
                on_reject(number, str(rejected), excerpt, rejected.domain or source.domain)
            else:
                yield number, taken, record.stop
    on_end(number)


def _enter(
    stack: ExitStack, manager: AbstractContextManager[Opened], source: Source, what: str
) -> Opened:
    try:
        return stack.enter_context(manager)
    except (EOFError, OSError) as error:
        raise SourceError(f"{source.path} cannot be {what}: {error}") from error


def _guarded(records: Iterator[Record], source: Source) -> Iterator[Record]:
    """Pass lines or rows on and turn what goes wrong in reading them into a SourceError.

    Only reading: an error of the caller, such as a full disk, must not be blamed on the input.
    """
    last: Record | None = None
    while True:
        try:
            last = next(records)
        except StopIteration:
            return
        except UnfitError as error:
            raise SourceError(f"{source.path} cannot be read: {error}.") from error
        except (EOFError, OSError, ValueError) as error:
            raise SourceError(
                f"{source.path} cannot be read {_describe(last, source)}: {error}. "
                "The file is damaged or cut short: fetch or compress it again."
            ) from error
        yield last


def _describe(last: Line | Row | None, source: Source) -> str:
    if last is None:
        return "at its beginning"
    if isinstance(last, Row):
        return f"after row {last.number}"
    if source.splittable:
        return f"after the line at byte {last.offset}"
    return f"after line {last.number}"
