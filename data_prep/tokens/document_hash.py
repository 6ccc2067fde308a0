"""The hash of a document, which decides whether it is tokenised, and later on where it goes.

A job keeps the hash that it was begun with: under another one validation text would move into
training. Its name stands in the plan and in the manifest; where there is none it is FIRST_HASH.
"""

import hashlib
from collections.abc import Callable, Mapping

HASHES = 1 << 64
FIRST_HASH, NEWEST_HASH = "blake2b_64", "xxh3_128"
# By name, how many numbers of 64 bits a hash is. The first one orders the documents; texts are the
# same where all are. Of 1e9 texts two have the same 64 bits with a chance of 3 %, and the same 128
# with one of 1e-21.
HASH_WORDS = {FIRST_HASH: 1, NEWEST_HASH: 2}
ABOVE_ALL = b"\xff" * (8 * max(HASH_WORDS.values()) + 1)


def hash_text(text: str) -> int:
    """FIRST_HASH as a number: what the demo and instruction data are divided by, for good."""
    return int.from_bytes(_blake2b_64(text), "big")


def read_hash(name: str) -> Callable[[str], bytes]:
    """The function from a text to its hash, 8 * HASH_WORDS[name] bytes that sort as documents do.

    Args:
        name: one of HASH_WORDS.
    """
    if name == FIRST_HASH:
        return _blake2b_64
    assert name == NEWEST_HASH, name
    import xxhash

    return xxhash.xxh3_128_digest  # of its UTF-8


def _blake2b_64(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def hash_limit(kept: Mapping[str, float], domain: str) -> bytes:
    """What the hash of every tokenised document, of any name, is below.

    A domain that no sample showed is tokenised whole.

    Args:
        kept: parts of the domains that are tokenised.
    """
    limit = round(kept.get(domain, 1.0) * HASHES)
    return limit.to_bytes(8, "big") if limit < HASHES else ABOVE_ALL
