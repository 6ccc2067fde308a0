"""Read the documents of a RedPajama-format folder: `<data>/<domain>/**.jsonl[.zst|.gz]`."""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
# A domain becomes a folder name, a YAML key and a metric label.
DOMAIN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
EXAMPLES_KEPT = 20
READ_BUFFER = 1 << 20


@dataclass
class ReadReport:
    """What reading has met so far.

    Args:
        documents: good documents read. Default: 0.
        rejects: bad lines per reason. Default: empty.
        examples: `file:line: reason` of the first bad lines. Default: empty.
    """

    documents: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def reject(self, path: Path, line_number: int, reason: str) -> None:
        """Count one bad line.

        Args:
            path: the file.
            line_number: its line, counted from 1.
            reason: why it was rejected, in words.
        """
        self.rejects[reason] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{path}:{line_number}: {reason}")

    def raise_if_above(self, maximum_reject_share: float) -> None:
        """Refuse data with too many bad lines.

        Args:
            maximum_reject_share: allowed share of bad lines among all lines, 0 to 1.

        Raises:
            ValueError: the share is above it; the message names the first bad lines.
        """
        rejected = sum(self.rejects.values())
        lines = rejected + self.documents
        if rejected > maximum_reject_share * lines:
            shown = "\n  ".join(self.examples)
            raise ValueError(
                f"{rejected} of {lines} lines are not usable, more than maximum_reject_share="
                f"{maximum_reject_share} allows. The first of them:\n  {shown}\n"
                "Repair or remove these lines, or raise maximum_reject_share."
            )


def find_files(data: Path) -> dict[str, list[Path]]:
    """Find the jsonl files of every domain, domains and files in sorted order.

    Args:
        data: folder whose first-level sub-folders are the domains.

    Raises:
        FileNotFoundError: `data` is no folder, or holds no jsonl file in any sub-folder.
        ValueError: jsonl files lie outside a domain folder, or a domain's name is unusable.
    """
    if not data.is_dir():
        raise FileNotFoundError(
            f"data={str(data)!r} is not a folder. Give a folder <data>/<domain>/**.jsonl[.zst|.gz]."
        )
    domains: dict[str, list[Path]] = {}
    for path in sorted(data.rglob("*"), key=lambda path: path.relative_to(data).as_posix()):
        parts = path.relative_to(data).parts
        if not path.name.endswith(SUFFIXES) or not path.is_file() or parts[0].startswith("."):
            continue
        if len(parts) == 1:
            raise ValueError(
                f"{path} lies outside a domain folder. Move it to {data}/<domain>/{path.name}."
            )
        domains.setdefault(parts[0], []).append(path)
    if not domains:
        raise FileNotFoundError(
            f"data={str(data)!r} holds no {', '.join(SUFFIXES)} file in any sub-folder. "
            "Give a folder <data>/<domain>/**.jsonl[.zst|.gz]."
        )
    _check_domain_names(domains)
    return domains


def _check_domain_names(domains: dict[str, list[Path]]) -> None:
    unusable = [name for name in domains if not DOMAIN_PATTERN.fullmatch(name)]
    if unusable:
        raise ValueError(
            f"Domain folders {unusable} have unusable names: letters, digits, '_' and '-' are "
            "allowed, because the name becomes a metric label. Rename the folders."
        )


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file for reading lines, decompressed by its suffix.

    Args:
        path: plain, `.gz` or `.zst` file; archives of several members or frames are read whole.

    Yields:
        The decompressed stream, and the file beneath it, whose position shows the progress.
    """
    with path.open("rb") as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw
        elif path.name.endswith(".zst"):
            import pyarrow

            stream = pyarrow.CompressedInputStream(raw, "zstd")
            with io.BufferedReader(stream, READ_BUFFER) as buffered:
                yield buffered, raw
        else:
            yield raw, raw


def parse_line(line: bytes) -> tuple[str | None, str]:
    """Take the text out of one line.

    Args:
        line: one line of a jsonl file; everything but its `text` is ignored.

    Returns:
        The text and "", or None and the reason why there is none.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "broken JSON"
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return None, "no text"
    if not text or text.isspace():
        return None, "empty text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair
        return None, "invalid UTF-8"
    return text, ""


def read_documents(path: Path, report: ReadReport, progress: tqdm | None = None) -> Iterator[str]:
    """Read the documents of one file in order, counting bad lines.

    Args:
        path: plain, `.gz` or `.zst` jsonl file; blank lines are skipped.
        report: updated with documents and rejects.
        progress: bar that counts bytes of the files as stored. Default: None.

    Raises:
        OSError: the file is no archive or is cut short; the message names the file and line.
    """
    line_number = position = 0
    with open_lines(path) as (stream, raw):
        try:
            for line_number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                text, reason = parse_line(line)
                if progress is not None:
                    progress.update(raw.tell() - position)
                    position = raw.tell()
                if text is None:
                    report.reject(path, line_number, reason)
                else:
                    report.documents += 1
                    yield text
        except (EOFError, OSError, zlib.error) as error:
            raise OSError(
                f"{path} cannot be read after line {line_number}: {error}. "
                "The archive is damaged or cut short: fetch or compress it again."
            ) from error
