"""Read the rows of an arrow file, as `datasets` keeps them on disk, through a memory map."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apex_composer.data_prep.read.parquet import TEXT, Row, check_text, take_row

FILE_START = b"ARROW1"  # the file format; anything else is the stream format
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# Text after which the pages of the map are given back: they would count as the worker's memory.
TEXT_MAPPED = 64_000_000


def read_arrow(path: Path, limit: int) -> Iterator[Row]:
    """Yield the rows of an arrow file that has a column `text`.

    Args:
        path: the file, of the stream or the file format.
        limit: bytes of a text at most.

    Raises:
        ValueError: it is no arrow file, is damaged or cut short, or has no such column.
        OSError: it cannot be read.
    """
    mapped = _map(path)
    number = size = 0
    for batch in _batches(mapped):
        for index in range(batch.num_rows):
            number += 1
            row = take_row(batch, index, number, limit)
            size += len(row.record.get(TEXT) or "")
            if size > TEXT_MAPPED:
                mapped.madvise(mmap.MADV_DONTNEED)
                size = 0
            yield row


def count_rows(path: Path) -> int:
    """Number of the rows of an arrow file; no text is read."""
    return sum(batch.num_rows for batch in _batches(_map(path)))


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _batches(mapped: mmap.mmap) -> Iterator[Any]:
    """The batches of the column `text`, each checked; whatever arrow says of damage, a ValueError.

    Damage may look like a type that arrow does not know, or like a size that no memory has.
    """
    from pyarrow import ArrowException

    try:
        yield from _open_batches(mapped)
    except ArrowException as error:
        raise ValueError(str(error)) from error


def _open_batches(mapped: mmap.mmap) -> Iterator[Any]:
    from pyarrow import BufferReader, ipc, py_buffer

    whole = py_buffer(mapped)
    if mapped[: len(FILE_START)] == FILE_START:
        reader = ipc.open_file(whole)
        check_text(reader.schema)
        for index in range(reader.num_record_batches):
            # All columns: of this format arrow copies chosen ones into memory, all do not move.
            yield _checked(reader.get_batch(index).select([TEXT]))
        return
    schema = ipc.open_stream(whole).schema
    check_text(schema)
    stream = BufferReader(whole)
    # Other columns are not even decompressed.
    options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(TEXT)], use_threads=False)
    for batch in ipc.open_stream(stream, options=options):
        yield _checked(batch)
    # A stream that was cut between two batches reads as a shorter one.
    if mapped[-len(STREAM_END) :] != STREAM_END or stream.tell() != len(mapped):
        raise ValueError("it does not end with the mark that closes a stream")


def _checked(batch: Any) -> Any:
    """Refuse positions that lead out of the file, which would end the process."""
    import pyarrow

    column = batch.column(0)
    # As bytes: a text that is no UTF-8 is a row to reject, not damage.
    plain = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    if column.type in plain:
        column = column.view(plain[column.type])
    column.validate(full=True)
    return batch
