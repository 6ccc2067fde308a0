"""The hash of a document, which decides whether it is tokenised, and later on where it goes."""

import hashlib
from collections.abc import Mapping

HASHES = 1 << 64


def hash_text(text: str) -> int:
    """Map a text to 64 bits that depend on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def hash_limit(kept: Mapping[str, float], domain: str) -> int:
    """First hash that is not tokenised; a domain that no sample showed is tokenised whole.

    Args:
        kept: parts of the domains that are tokenised.
    """
    return round(kept.get(domain, 1.0) * HASHES)
