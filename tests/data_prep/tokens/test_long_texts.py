import numpy as np
import pytest
from backends import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_composer.data_prep.tokens import long_texts
from apex_composer.data_prep.tokens.long_texts import split_text, starts_with_blank
from apex_composer.data_prep.tokens.word_encoder import make_encoder


def parts_of(text, gives_blank, size):
    long_texts.PART_CHARACTERS, before = size, long_texts.PART_CHARACTERS
    try:
        return list(split_text(text, gives_blank))
    finally:
        long_texts.PART_CHARACTERS = before


@given(text=st.text(st.sampled_from("ab \n"), max_size=60), size=st.integers(2, 20))
def test_the_parts_of_a_text_are_the_text(text, size):
    parts = parts_of(text, False, size)
    assert "".join(part for part, _ in parts) == text
    assert all(0 < len(part) <= size for part, _ in parts) or text == ""
    middle = ["middle"] * (len(parts) - 2)
    positions = [position for _, position in parts]
    assert positions == (["only"] if len(parts) == 1 else ["first", *middle, "last"])


# Blanks are often enough for a cut at one; what stands beside a cut is anything.
WORD = st.text(st.sampled_from("ab,'s9é日\n\t\x1c\xa0\u2581 "), max_size=4).map(lambda w: f"x{w}y")


@pytest.mark.parametrize("name", BACKENDS)
@given(words=st.lists(WORD, max_size=30))
@settings(max_examples=200)
def test_the_tokens_of_the_parts_are_those_of_the_text(name, words):
    text, encode = " ".join(words), make_encoder(BACKENDS[name])
    parts = [part for part, _ in parts_of(text, starts_with_blank(encode), 24)]
    assert np.concatenate(encode(parts)).tolist() == encode([text])[0].tolist()


def test_a_tokenizer_that_begins_with_a_blank_is_known():
    found = {name: starts_with_blank(make_encoder(backend)) for name, backend in BACKENDS.items()}
    assert found == {name: name != "byte level" for name in BACKENDS}
