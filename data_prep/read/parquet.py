"""Read the rows of a parquet file in small batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.read.domains import SAMPLE_FIELD
from apex_composer.data_prep.read.records import INVALID_UTF8, NO_TEXT, TOO_LONG

TEXT = "text"
# What the domain is inferred from; other columns are not read.
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


def read_rows(path: Path, limit: int) -> Iterator[Row]:
    """Yield the rows of a parquet file that has a column `text`.

    Args:
        path: the file.
        limit: bytes of a text at most.

    Raises:
        ValueError: it is no parquet file, is damaged, or has no such column.
        OSError: it cannot be read.
    """
    from pyarrow.parquet import ParquetFile

    # A buffer and no pre-buffering: only the pages in use are in memory, not a whole row group.
    with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if TEXT not in names:
            raise ValueError(f"it has no column {TEXT!r}; its columns are {names}")
        columns = [name for name in COLUMNS if name in names]
        number = 0
        for group in range(file.num_row_groups):
            rows = _rows_at_once(file.metadata.row_group(group))
            batches = file.iter_batches(
                rows, row_groups=[group], columns=columns, use_threads=False
            )
            for batch in batches:
                for index in range(batch.num_rows):
                    number += 1
                    yield _take_row(batch, index, number, limit)


def _rows_at_once(group: Any) -> int:
    size = group.total_byte_size / max(1, group.num_rows)  # of a row, uncompressed, on average
    if size * min(group.num_rows, PAGE_ROWS) > PAGE_LIMIT:
        raise ValueError(
            f"its rows have {size / 1e6:.0f} MB on average, and pages of them would not fit into "
            "the memory of a worker (1 GB); write it with row groups of fewer rows"
        )
    return max(1, min(ROWS_AT_ONCE, int(TEXT_AT_ONCE / max(1.0, size))))


def _take_row(batch: Any, index: int, number: int, limit: int) -> Row:
    record: dict[str, Any] = {}
    reason = ""
    for name in batch.schema.names:
        scalar = batch.column(name)[index]
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
