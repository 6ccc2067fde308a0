import json
import os

import pytest
from backends import BACKENDS, TEXTS, byte_level, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from apex_composer.data_prep.tokens import word_encoder
from apex_composer.data_prep.tokens.word_encoder import (
    BLANK,
    encode_all,
    make_word_encoder,
    read_encoder,
)

# What the patterns and the normalisers treat each in its own way.
PIECES = [
    *" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u180e\u200b\ufeff",
    *(BLANK, "'s", "'LL", "don't", "_", "٣", "½", "é", "e\u0301", "日本", "\U0001f600", "\x00"),
    *("<s>", "</s>", "<|end_of_text|>", "<0x0A>", "  ", "\n    ", "x" * 70, "word", "Ba", "9", "."),
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.text(st.characters(codec="utf-8")),
)
ENCODERS = {name: make_word_encoder(backend) for name, backend in BACKENDS.items()}


@pytest.mark.parametrize("name", BACKENDS)
@given(texts=st.lists(TEXT, max_size=3))
@settings(max_examples=300)
def test_the_tokens_are_those_of_the_backend(name, texts):
    expected = [ids.tolist() for ids in encode_all(BACKENDS[name], texts)]
    assert [ids.tolist() for ids in ENCODERS[name](texts)] == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_a_full_cache_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(word_encoder, "CACHED_WORDS", 3)
    monkeypatch.setattr(word_encoder, "LONGEST_CACHED", 4)
    encoder = make_word_encoder(BACKENDS[name])
    for _ in range(2):
        for text, ids in zip(TEXTS, encoder(TEXTS), strict=True):
            assert ids.tolist() == encode_all(BACKENDS[name], [text])[0].tolist()
    assert len(encoder.__self__.known) <= 3


def test_words_are_cut_between_letters_signs_and_digits_only_when_nothing_joins_them():
    apart = BACKENDS["kinds apart"]
    vocabulary = json.loads(apart.to_str())["model"]["vocab"]
    assert {f"{BLANK}return", "'", "10"} <= set(vocabulary)
    assert make_word_encoder(apart).__self__.smaller_words is word_encoder.ASCII_BLANK_WORDS
    assert make_word_encoder(BACKENDS["prepend"]).__self__.smaller_words is None
    merges = json.loads(apart.to_str())["model"]["merges"]
    for joined in (["n", "'"], ["1", "a"], ["(", "1"], ["<0x41>", "<0x42>"]):
        added = dict(vocabulary)
        for token in (*joined, "".join(joined)):
            added.setdefault(token, len(added))
        crossing = sentencepiece(joins_kinds=False, vocab=added, merges=[*merges, joined])
        assert make_word_encoder(crossing).__self__.smaller_words is None


def change(tokenizer, **changes):
    parts = json.loads(tokenizer.to_str()) | changes
    changed = Tokenizer.from_str(json.dumps(parts))
    changed.encode_special_tokens = True
    return changed


def test_other_tokenizers_are_left_to_the_backend():
    def with_token(token):
        vocabulary = json.loads(sentencepiece().to_str())["model"]["vocab"]
        return sentencepiece(vocab=vocabulary | {token: len(vocabulary)})

    plain = byte_level()
    plain.encode_special_tokens = False
    others = [
        plain,
        change(byte_level(), normalizer={"type": "NFC"}),
        change(byte_level(), pre_tokenizer={"type": "Whitespace"}),
        sentencepiece(byte_fallback=False),
        sentencepiece(ignore_merges=True),
        with_token(f"a{BLANK}"),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ]
    assert [make_word_encoder(other) for other in others] == [None] * len(others)
    texts = ["words and words"]
    assert (
        word_encoder.make_encoder(others[1])(texts)[0].tolist()
        == others[1].encode(texts[0]).ids[1:]
    )
    lines = make_word_encoder(with_token("\n\n"))
    assert lines.__self__.words is word_encoder.BLANK_WORDS


def test_another_tokenizer_at_the_same_path_is_read_anew(tmp_path):
    path, text = tmp_path / "tokenizer.json", TEXTS[0]
    for modified, backend in enumerate((byte_level(), sentencepiece()), start=1):
        path.write_text(backend.to_str())
        os.utime(path, ns=(modified, modified))
        found = read_encoder(str(path))([text])[0].tolist()
        assert found == encode_all(backend, [text])[0].tolist()
