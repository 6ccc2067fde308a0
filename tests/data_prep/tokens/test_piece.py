import json
from dataclasses import replace

import numpy as np
import pytest
from backends import BACKENDS
from corpus import sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import tokenizer_folder

from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens import piece as tokenise
from apex_composer.data_prep.tokens.document_hash import hash_text
from apex_composer.data_prep.tokens.piece import (
    PieceTask,
    split_text,
    starts_with_blank,
    tokenise_piece,
)
from apex_composer.data_prep.tokens.tokenizer import read_backend
from apex_composer.data_prep.tokens.word_encoder import make_encoder

TEXTS = [sentences(seed, words=10 + 7 * seed) for seed in range(40)]
BOS, EOS = 0, 1


def work_on(path, folder, **changes):
    task = PieceTask(
        folder=folder,
        source=Source(str(path), "book", "jsonl", bytes=0, splittable=False),
        start=0,
        stop=None,
        kept={},
        tokenizer_file=tokenizer_folder() / "tokenizer.json",
        bos=BOS,
        eos=EOS,
        dtype="uint16",
        downloads=folder / "downloads",
    )
    report = tokenise_piece(replace(task, **changes), lambda news: None)
    tokens = np.fromfile(folder / tokenise.TOKENS, dtype=np.uint16)
    return report, np.fromfile(folder / tokenise.DOCUMENTS, dtype=tokenise.DOCUMENT_TYPE), tokens


@pytest.mark.parametrize("bos", [BOS, None])
def test_documents_stand_one_after_the_other_between_bos_and_eos(tmp_path, bos):
    path = write_jsonl(tmp_path / "x.jsonl.zst", [*TEXTS[:20], b"bad", *TEXTS[20:]])
    report, documents, tokens = work_on(path, tmp_path / "piece", bos=bos)
    encode = read_backend(str(tokenizer_folder() / "tokenizer.json")).encode
    before = [] if bos is None else [bos]
    expected = [[*before, *encode(text, add_special_tokens=False).ids, EOS] for text in TEXTS]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert documents["length"].tolist() == [len(ids) for ids in expected]
    assert documents["hash"].tolist() == [hash_text(text) for text in TEXTS]
    assert (report.documents, report.tokens) == (40, len(tokens))
    [reject] = map(json.loads, (tmp_path / "piece" / tokenise.REJECTS).read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (21, "broken JSON")


def test_a_long_document_has_one_bos_and_one_eos(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "PART_CHARACTERS", 50)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 60)
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    _, documents, tokens = work_on(path, tmp_path / "piece")
    ends = np.cumsum(documents["length"]) - 1
    assert np.flatnonzero(tokens == EOS).tolist() == ends.tolist()
    assert np.flatnonzero(tokens == BOS).tolist() == [0, *(ends[:-1] + 1)]
    decode = read_backend(str(tokenizer_folder() / "tokenizer.json")).decode
    cut = np.split(tokens, ends[:-1] + 1)
    assert [decode(ids[1:-1].tolist()) for ids in cut] == TEXTS


def test_only_documents_below_the_limit_are_tokenised(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    report, documents, _ = work_on(path, tmp_path / "piece", kept={"book": 0.4})
    kept = [hash_text(text) for text in TEXTS if hash_text(text) < 0.4 * 2**64]
    assert documents["hash"].tolist() == kept
    assert report.domains == {"book": {"documents": 40, "documents_tokenised": len(kept)}}


def parts_of(text, gives_blank, size):
    tokenise.PART_CHARACTERS, before = size, tokenise.PART_CHARACTERS
    try:
        return list(split_text(text, gives_blank))
    finally:
        tokenise.PART_CHARACTERS = before


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
