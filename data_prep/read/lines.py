"""Read the lines of plain and compressed jsonl files with bounded memory."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.read.records import TOO_LONG, parse_line

READ_BUFFER = 1 << 18  # more is slower: it is beyond the caches of a core
EXCERPT_BYTES = 200
COMPRESSED = (".gz", ".zst")


class Line(NamedTuple):
    """One line as it was read.

    Args:
        number: counted from 1 from where reading began.
        offset: byte in the decompressed stream at which it starts.
        stop: byte after its end.
        content: its bytes; of a line that is longer than allowed only the beginning.
        is_whole: False for a line that is longer than allowed.
    """

    number: int
    offset: int
    stop: int
    content: bytes
    is_whole: bool = True

    @property
    def is_blank(self) -> bool:
        """Whether it is no record at all."""
        return self.is_whole and self.content.isspace()

    def parse(self) -> dict[str, Any]:
        """The record that it is.

        Raises:
            Rejected: it is none.
        """
        if not self.is_whole:
            raise Rejected(TOO_LONG)
        return parse_line(self.content)


@contextmanager
def open_lines(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading lines, decompressed by its suffix.

    Args:
        path: plain, `.gz` or `.zst` file; archives of several members or frames are read whole.

    Raises:
        EOFError: an archive of no bytes, which both decompressors would take for an empty one.
    """
    if path.suffix in COMPRESSED and path.stat().st_size == 0:
        raise EOFError("the archive has no bytes")
    with path.open("rb", buffering=READ_BUFFER) as raw:
        if path.suffix not in COMPRESSED:
            yield raw
            return
        if path.suffix == ".gz":
            decompressed = Gunzipped(raw)
        else:
            import pyarrow

            decompressed = pyarrow.CompressedInputStream(raw, "zstd")
        # Neither makes lines in C; the reader around it does.
        with io.BufferedReader(decompressed, READ_BUFFER) as stream:
            yield stream


class Gunzipped(io.RawIOBase):
    """What a gzip archive holds; that it is damaged is an OSError, as it is in other archives.

    Args:
        archive: file of one member or many.
    """

    def __init__(self, archive: BinaryIO):
        from isal import igzip, isal_zlib  # three times as fast as Python's gzip

        self.stream = igzip.IGzipFile(fileobj=archive)
        self.damage = isal_zlib.error

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, block: memoryview) -> int:
        """Fill a block, less at the end."""
        try:
            return self.stream.readinto(block)
        except self.damage as error:
            raise OSError(str(error)) from error


def read_lines(stream: BinaryIO, offset: int, limit: int) -> Iterator[Line]:
    """Yield the lines of a stream; a line above the limit is skipped without being held whole.

    Args:
        stream: at the start of a line.
        offset: byte at which the stream stands.
        limit: bytes of a line at most, its end not counted.
    """
    number = 0
    while content := stream.readline(limit + 1):
        number += 1
        start, offset = offset, offset + len(content)
        if len(content) > limit and not content.endswith(b"\n"):
            content = content[:EXCERPT_BYTES]  # the rest is freed before more is read
            offset += skip_line(stream)
            yield Line(number, start, offset, content, is_whole=False)
        else:
            yield Line(number, start, offset, content)


def read_range(stream: BinaryIO, start: int, stop: int | None, limit: int) -> Iterator[Line]:
    """Yield the lines that start in [start, stop), whatever bytes the two cut through.

    Args:
        stream: plain file.
        start: first byte at which a line may start.
        stop: byte at which no line may start any more, None to read to the end.
        limit: bytes of a line at most.
    """
    offset = start
    if start > 0:
        # From one byte earlier: if that byte ends a line, then a line starts at `start`.
        stream.seek(start - 1)
        offset = start - 1 + skip_line(stream)
    for line in read_lines(stream, offset, limit):
        if stop is not None and line.offset >= stop:
            return
        yield line


def skip_line(stream: BinaryIO) -> int:
    """Read on to the end of the current line and return how many bytes that took."""
    skipped = 0
    while chunk := stream.readline(READ_BUFFER):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped
