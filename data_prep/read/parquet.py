"""Read the rows of a parquet file in small batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from apex_composer.data_prep.errors import Rejected, UnfitError
from apex_composer.data_prep.read.domains import SAMPLE_FIELD
from apex_composer.data_prep.read.records import INVALID_UTF8, NO_TEXT, TOO_LONG

TEXT = "text"
# What the domain is inferred from, but for FineWeb's; other columns are not read.
COLUMNS = (TEXT, "meta", SAMPLE_FIELD, "source", "wiki_prob", "pred_label", "pred_label_prob")
ROWS_AT_ONCE = 64
# Text that is decoded at once; one row may be larger.
TEXT_AT_ONCE = 4_000_000
# A page is decoded as a whole, twice in memory, and arrow's writer cuts none of fewer rows.
PAGE_ROWS = 1024
PAGE_LIMIT = 400_000_000


class Row(NamedTuple):
    """One row.

    Args:
        number: counted from 1.
        record: its columns; without the text when there is a reason.
        reason: why it is no document, or "".
    """

    number: int
    record: dict[str, Any]
    reason: str

    # As those of a line.
    stop = 0
    is_blank = False

    @property
    def content(self) -> bytes:
        """What is shown of it when it is rejected."""
        return str(self.record).encode()

    def parse(self) -> dict[str, Any]:
        """The record that it is.

        Raises:
            Rejected: it is none.
        """
        if self.reason:
            raise Rejected(self.reason)
        return self.record


def read_rows(path: Path, limit: int, format: str) -> Iterator[Row]:
    """Yield the rows of a parquet file that has a column `text`.

    Args:
        path: the file.
        limit: bytes of a text at most.
        format: `fineweb`, of which the text alone is read, or another.

    Raises:
        UnfitError: it has no such column, or one of other things than text; a ValueError.
        ValueError: it is no parquet file, or is damaged; of pages without checksums not all shows.
        OSError: it cannot be read.
    """
    from pyarrow import ArrowException

    try:
        yield from _read_rows(path, limit, format)
    # Types that arrow does not know, columns of one name, times that Python does not know.
    except (ArrowException, KeyError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _read_rows(path: Path, limit: int, format: str) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    # A buffer and no pre-buffering: only the pages in use are in memory, not a whole row group.
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    with ParquetFile(path, **options) as file:
        check_text(file.schema_arrow)
        wanted = (TEXT,) if format == "fineweb" else COLUMNS
        columns = [name for name in wanted if name in file.schema_arrow.names]
        number = 0
        for group in range(file.num_row_groups):
            rows = _rows_at_once(file.metadata.row_group(group), columns)
            batches = file.iter_batches(
                rows, row_groups=[group], columns=columns, use_threads=False
            )
            for batch in batches:
                for index in range(batch.num_rows):
                    number += 1
                    yield take_row(batch, index, number, limit)


def _rows_at_once(group: Any, columns: list[str]) -> int:
    stored = [group.column(number) for number in range(group.num_columns)]
    read = [leaf for leaf in stored if leaf.path_in_schema.split(".")[0] in columns]
    # Of a row, uncompressed, on average.
    size = sum(leaf.total_uncompressed_size for leaf in read) / max(1, group.num_rows)
    largest = max([size * min(group.num_rows, PAGE_ROWS), *map(_dictionary_bytes, read)])
    if largest > PAGE_LIMIT:
        raise ValueError(
            f"its rows have {size / 1e6:.0f} MB on average, and pages of {largest / 1e6:.0f} MB "
            "would not fit into the memory of a worker (1 GB); write it with row groups of fewer "
            "rows"
        )
    return max(1, min(ROWS_AT_ONCE, int(TEXT_AT_ONCE / max(1.0, size))))


def _dictionary_bytes(leaf: Any) -> float:
    """Size of the page of a column's distinct texts, which some writers do not limit."""
    if not leaf.has_dictionary_page or not leaf.total_compressed_size:
        return 0.0
    stored = leaf.data_page_offset - leaf.dictionary_page_offset
    return stored * leaf.total_uncompressed_size / leaf.total_compressed_size


def check_text(schema: Any) -> None:
    """Refuse a schema without a column of text.

    Args:
        schema: pyarrow's.

    Raises:
        UnfitError: there is no column `text`, or several, or it holds something else.
    """
    from pyarrow import types

    if schema.names.count(TEXT) != 1:
        many = "more than one" if TEXT in schema.names else "no"
        raise UnfitError(f"it has {many} column {TEXT!r}; its columns are {schema.names}")
    kind = schema.field(TEXT).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(kind) for check in is_text):
        raise UnfitError(f"its column {TEXT!r} holds {kind}, not string")


def take_row(batch: Any, index: int, number: int, limit: int) -> Row:
    """Take one row out of a batch.

    Args:
        batch: of pyarrow, with a column `text`.
        index: place in it.
        number: of the row, counted from 1.
        limit: bytes of a text at most.
    """
    record: dict[str, Any] = {}
    reason = ""
    for name in batch.schema.names:
        scalar = batch.column(name)[index]
        if hasattr(scalar, "dictionary"):  # each distinct text is stored once
            scalar = scalar.value
        if name == TEXT and not scalar.is_valid:
            reason = NO_TEXT
        elif name == TEXT and hasattr(scalar, "as_buffer") and scalar.as_buffer().size > limit:
            reason = TOO_LONG
        else:
            try:
                record[name] = scalar.as_py()
            except UnicodeDecodeError:
                reason = INVALID_UTF8
    return Row(number, record, reason)
