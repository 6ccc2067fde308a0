import hashlib

import pytest
import xxhash
from corpus import sentences

from apex_composer.data_prep.tokens.document_hash import (
    FIRST_HASH,
    HASH_WORDS,
    NEWEST_HASH,
    hash_limit,
    hash_text,
    read_hash,
)

TEXTS = [sentences(seed, words=5) for seed in range(2000)]


def test_the_first_hash_is_64_bits_of_blake2b():
    """Plans and pieces on disk hold them: another hash would divide the same text otherwise."""
    assert hash_text("Überall") == int(
        hashlib.blake2b("Überall".encode(), digest_size=8).hexdigest(), 16
    )
    assert hash_text("") == 0xE4A6A0577479B2B4
    for text in TEXTS[:20]:
        assert read_hash(FIRST_HASH)(text) == hash_text(text).to_bytes(8, "big")


def test_the_newest_hash_is_128_bits_of_xxh3():
    digest = read_hash(NEWEST_HASH)
    assert digest("").hex() == "99aa06d3014798d86001c324468d497f"  # that of xxHash's own tests
    for text in ("Überall", "x\U0001f600", "a\0b", *TEXTS[:20]):
        assert int.from_bytes(digest(text), "big") == xxhash.xxh3_128_intdigest(text.encode())


def test_no_hash_stands_in_for_an_unknown_one():
    with pytest.raises(AssertionError, match="md5"):
        read_hash("md5")


@pytest.mark.parametrize("name", HASH_WORDS)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 1.0])
def test_the_limit_keeps_its_part_of_the_texts_by_their_first_64_bits(name, part):
    digests, limit = list(map(read_hash(name), TEXTS)), hash_limit({"book": part}, "book")
    assert {len(digest) for digest in digests} == {8 * HASH_WORDS[name]}
    kept = [digest < limit for digest in digests]
    assert kept == [int.from_bytes(digest[:8], "big") < part * 2**64 for digest in digests]
    assert sum(kept) / len(TEXTS) == pytest.approx(part, abs=0.03)


@pytest.mark.parametrize("words", HASH_WORDS.values())
def test_a_hash_at_the_limit_is_left_out(words):
    limit, rest = hash_limit({"book": 0.5}, "book"), bytes(8 * (words - 1))
    assert not limit + rest < limit and (2**63 - 1).to_bytes(8, "big") + rest < limit


@pytest.mark.parametrize("words", HASH_WORDS.values())
def test_a_domain_that_no_sample_showed_is_kept_whole(words):
    assert b"\xff" * 8 * words < hash_limit({"book": 0.1}, "arxiv")
