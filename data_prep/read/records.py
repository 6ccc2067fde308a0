"""Take the domain and the text out of one record, or say why it is rejected."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.read.domains import (
    infer_domain,
    slimpajama_domain,
    source_domain,
)

# Why a record is rejected.
BROKEN_JSON = "broken JSON"
INVALID_UTF8 = "invalid UTF-8"
NO_TEXT = "no text"
EMPTY_TEXT = "empty text"
TOO_LONG = "too long"
CUT_SHORT = "cut short at the end of the file"
UNKNOWN_DOMAIN = "unknown domain"

TEXT_FIELDS = {"redpajama-v2": "raw_content"}

MOST_LEVELS = 1024  # as orjson has it
MOST_DIGITS = 4300  # as Python has it unless it is told otherwise
# Bytes of a line: beside the record orjson holds 16 bytes for every value in it, `json` none.
MOST_FOR_ORJSON = 16_000_000
SURROGATE = re.compile("[\ud800-\udfff]")
NO_STRUCTURE = bytes({*range(256)} - {*b'"[]{}'})


class LooseRecord(dict[str, Any]):
    """A record that only `json` reads, whose texts may hold halves of surrogate pairs."""


def parse_line(line: bytes) -> dict[str, Any]:
    """Read one line of JSON as `parse_with_json` does, with orjson, which takes a quarter the time.

    orjson accepts nothing that `json` does not, and gives the same record. What it refuses goes to
    `json`, which accepts some of that: NaN and infinite numbers, a byte-order mark, and halves of
    surrogate pairs.

    Args:
        line: one line; only the last one of a file may have no end.

    Raises:
        Rejected: it is no UTF-8 or no JSON object.
    """
    import orjson

    try:
        record = orjson.loads(line) if len(line) <= MOST_FOR_ORJSON else None
    except orjson.JSONDecodeError:
        record = None
    # Not in the `except`: its error holds the line as a text, which may be large.
    return record if isinstance(record, dict) else parse_with_json(line)


def parse_with_json(line: bytes) -> LooseRecord:
    """Read one line of JSON, the same on every machine; a byte-order mark before it is ignored.

    Where `json` alone would ask the depth of the stack, or the version or settings of Python, a
    line that is nested in more than 1,024 levels, or has an integer of more than 4,300 digits, is
    broken. Integers beyond 64 bits are floats.

    Args:
        line: as that of `parse_line`.

    Raises:
        Rejected: it is no UTF-8 or no JSON object.
    """
    try:
        text = line.decode("utf-8-sig")
        with _room_for_nesting(line):
            record = json.loads(text, parse_int=_read_integer)
    except UnicodeDecodeError:
        raise Rejected(INVALID_UTF8) from None
    except ValueError:
        raise Rejected(BROKEN_JSON if line.endswith(b"\n") else CUT_SHORT) from None
    if not isinstance(record, dict):
        raise Rejected(NO_TEXT)
    return LooseRecord(record)


def _read_integer(digits: str) -> int | float:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError("an integer of too many digits")
    if len(digits) > 20:  # more than 64 bits have
        return float(digits)
    number = int(digits)
    return number if -(1 << 63) <= number < 1 << 64 else float(number)


@contextmanager
def _room_for_nesting(line: bytes) -> Iterator[None]:
    """Let `json` go as deep as is allowed, however deep the caller stands.

    Raises:
        ValueError: the line is nested deeper.
    """
    if _is_nested_too_deep(line):
        raise ValueError("too many levels")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + MOST_LEVELS)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _is_nested_too_deep(line: bytes) -> bool:
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left bounds a string
    level, in_string = 0, False
    for byte in bare.translate(None, NO_STRUCTURE).replace(b'""', b""):
        if byte in b'"':
            in_string = not in_string
        elif not in_string:
            level += 1 if byte in b"[{" else -1
            if level > MOST_LEVELS:
                return True
    return False


def take_document(
    record: Mapping[str, Any], file_format: str, domain: str | None
) -> tuple[str, str]:
    """Take the domain and the text of a record.

    Args:
        record: one record, of `parse_line` or a file of another kind that holds Unicode only.
        file_format: name of the format, which names the fields.
        domain: domain of the whole file, None when every record has its own.

    Returns:
        The domain and the text.

    Raises:
        Rejected: there is no text, it is blank or no Unicode text, or the domain is not shown.
    """
    if domain is None and file_format == "slimpajama":
        domain = slimpajama_domain(record.get("meta"))
    elif domain is None and file_format == "dolma":
        domain = source_domain(record.get("source"))
    elif domain is None:
        domain = infer_domain(record)
    text = record.get(TEXT_FIELDS.get(file_format, "text"))
    if not isinstance(text, str):
        raise Rejected(NO_TEXT, domain)
    if not text or text.isspace():
        raise Rejected(EMPTY_TEXT, domain)
    if isinstance(record, LooseRecord) and SURROGATE.search(text):
        raise Rejected(INVALID_UTF8, domain)
    if domain is None:
        raise Rejected(UNKNOWN_DOMAIN)
    return domain, text
