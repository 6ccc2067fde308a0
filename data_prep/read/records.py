"""Take the domain and the text out of one record, or say why it is rejected."""

import json
from collections.abc import Mapping
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


def parse_line(line: bytes) -> dict[str, Any]:
    """Read one line of JSON; a byte-order mark before it is ignored.

    Args:
        line: one line; only the last one of a file may have no end.

    Raises:
        Rejected: it is no UTF-8 or no JSON object.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Rejected(INVALID_UTF8) from None
    except (ValueError, RecursionError):
        raise Rejected(BROKEN_JSON if line.endswith(b"\n") else CUT_SHORT) from None
    if not isinstance(record, dict):
        raise Rejected(NO_TEXT)
    return record


def take_document(
    record: Mapping[str, Any], file_format: str, domain: str | None
) -> tuple[str, str]:
    """Take the domain and the text of a record.

    Args:
        record: one record.
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair
        raise Rejected(INVALID_UTF8, domain) from None
    if domain is None:
        raise Rejected(UNKNOWN_DOMAIN)
    return domain, text
