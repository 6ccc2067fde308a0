import hashlib

import pytest
from corpus import sentences

from apex_composer.data_prep.tokens.document_hash import HASHES, hash_limit, hash_text

TEXTS = [sentences(seed, words=5) for seed in range(2000)]


def test_a_hash_is_the_first_64_bits_of_blake2b():
    """Plans and pieces on disk hold them: another hash would divide the same text otherwise."""
    assert hash_text("Überall") == int(
        hashlib.blake2b("Überall".encode(), digest_size=8).hexdigest(), 16
    )
    assert hash_text("") == 0xE4A6A0577479B2B4


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 1.0])
def test_the_limit_keeps_its_part_of_the_texts(part):
    kept = sum(hash_text(text) < hash_limit({"book": part}, "book") for text in TEXTS)
    assert kept / len(TEXTS) == pytest.approx(part, abs=0.03)


def test_a_domain_that_no_sample_showed_is_kept_whole():
    assert hash_limit({"book": 0.1}, "arxiv") == HASHES
