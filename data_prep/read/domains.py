"""Domains: the names of RedPajama's seven, and how a record shows its own."""

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# LLaMA-1, table 1, in percent; the paper takes its pre-training and evaluation data in these.
LLAMA1 = {
    "cc": 67.0,
    "c4": 15.0,
    "github": 4.5,
    "book": 4.5,
    "wikipedia": 4.5,
    "arxiv": 2.5,
    "stackexchange": 2.0,
}
ALIASES = {
    "common_crawl": "cc", "commoncrawl": "cc", "books": "book", "wiki": "wikipedia",
    "stack_exchange": "stackexchange", "c4-rp": "c4",
}  # fmt: skip
SLIMPAJAMA_FIELD = "redpajama_set_name"
SLIMPAJAMA_PREFIX = "RedPajama"
SAMPLE_FIELD = "red_pajama_subset"
# Keys that the records of one domain have, to be looked for in this order; c4 has none of its own.
OWN_KEYS = {
    "cc": {"wiki_prob", "pred_label", "pred_label_prob"},
    "stackexchange": {"question_score"},
    "arxiv": {"arxiv_id", "yymm"},
    "github": {"content_hash", "repo_name", "max_line_length"},
    "book": {"short_book_title", "publication_date"},
    "wikipedia": {"title"},
}
# A domain becomes a folder name, a YAML key and a metric label.
DOMAIN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
DOMAIN_LENGTH = 64  # characters of a record's source that are kept


def normalise_domain(name: str) -> str:
    """Give a domain of RedPajama its one name; any other name stays as it is.

    Args:
        name: a folder's or a record's name, such as `common_crawl` or `RedPajamaCommonCrawl`.
    """
    plain = name.removeprefix(SLIMPAJAMA_PREFIX).lower()
    plain = ALIASES.get(plain, plain)
    return plain if plain in LLAMA1 else name


def slimpajama_domain(meta: Any) -> str | None:
    """Name the domain that SlimPajama writes into a record, None when there is none.

    Args:
        meta: the record's `meta`.
    """
    name = meta.get(SLIMPAJAMA_FIELD) if isinstance(meta, Mapping) else None
    if not isinstance(name, str):
        return None
    domain = normalise_domain(name)
    return domain if DOMAIN_PATTERN.fullmatch(domain) else None


def source_domain(source: Any) -> str | None:
    """Make a domain of the source that a record of Dolma names, None when it names none.

    A usable name stays as it is (`wiki` too: it is another source than `wikipedia`). In any other,
    and in one above 64 characters, what is not allowed becomes `_`, and 8 digits of its hash are
    added, so that no two sources fall together: `web/en` becomes `web_en-` and the digits.

    Args:
        source: the record's `source`.
    """
    if not isinstance(source, str) or not source.strip():
        return None
    if DOMAIN_PATTERN.fullmatch(source) and len(source) <= DOMAIN_LENGTH:
        return source
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", source[:DOMAIN_LENGTH]).lstrip("_-")
    encoded = source.encode("utf-8", "surrogatepass")
    return f"{plain or 'source'}-{hashlib.blake2b(encoded, digest_size=4).hexdigest()}"


def infer_domain(record: Mapping[str, Any]) -> str | None:
    """Infer the domain of a record of the 1T-Sample from its keys, None when nothing fits.

    Args:
        record: the whole record; `meta` may be a mapping, or a string that is JSON or a Python
            literal, as the parquet mirror has it.
    """
    named = record.get(SAMPLE_FIELD)
    if isinstance(named, str) and normalise_domain(named) in LLAMA1:
        return normalise_domain(named)
    meta = parse_meta(record.get("meta"))
    # Common crawl has no `meta`: its fields stand in the record itself.
    # A parquet file of one schema gives every record all keys, most of them null.
    keys = {key for given in (record, meta) for key, value in given.items() if value is not None}
    for domain, own in OWN_KEYS.items():
        if keys & own:
            return domain
    return "c4" if meta.get("source") == "c4" or {"url", "timestamp"} <= keys else None


def parse_meta(meta: Any) -> Mapping[str, Any]:
    """Read a record's `meta`, whatever form it has; what cannot be read is empty.

    Args:
        meta: a mapping, None, or a string that is JSON or a Python literal.
    """
    if isinstance(meta, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                meta = parse(meta)
                break
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    return meta if isinstance(meta, Mapping) else {}
