import json
import shutil

import numpy as np
import pytest
from corpus import sentences, write_jsonl
from prepared import tokenizer_folder

from apex_composer.data_prep.paths import TOKENIZER_FOLDER, piece_folder
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens import long_texts
from apex_composer.data_prep.tokens import piece as tokenise
from apex_composer.data_prep.tokens.document_hash import hash_text
from apex_composer.data_prep.tokens.piece import (
    PieceTask,
    tokenise_piece,
)
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts, read_backend

TEXTS = [sentences(seed, words=10 + 7 * seed) for seed in range(40)]
BOS, EOS = 0, 1


def work_on(path, out, bos=BOS, kept=None):
    task = PieceTask(
        out=out,
        number=0,
        source=Source(str(path), "book", "jsonl", bytes=0, splittable=False),
        start=0,
        stop=None,
        kept=kept or {},
        tokenizer=TokenizerFacts("t", "", vocabulary_size=320, bos=bos, eos=EOS),
    )
    shutil.copytree(tokenizer_folder(), out / TOKENIZER_FOLDER)
    report, folder = tokenise_piece(task, lambda news: None), piece_folder(out, 0)
    tokens = np.fromfile(folder / tokenise.TOKENS, dtype=np.uint16)
    return report, np.fromfile(folder / tokenise.DOCUMENTS, dtype=tokenise.DOCUMENT_TYPE), tokens


@pytest.mark.parametrize("bos", [BOS, None])
def test_documents_stand_one_after_the_other_between_bos_and_eos(tmp_path, bos):
    path = write_jsonl(tmp_path / "x.jsonl.zst", [*TEXTS[:20], b"bad", *TEXTS[20:]])
    report, documents, tokens = work_on(path, tmp_path / "out", bos=bos)
    encode = read_backend(str(tokenizer_folder() / "tokenizer.json")).encode
    before = [] if bos is None else [bos]
    expected = [[*before, *encode(text, add_special_tokens=False).ids, EOS] for text in TEXTS]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert documents["length"].tolist() == [len(ids) for ids in expected]
    assert documents["hash"].tolist() == [hash_text(text) for text in TEXTS]
    assert (report.documents, report.tokens) == (40, len(tokens))
    [reject] = map(
        json.loads, (piece_folder(tmp_path / "out", 0) / tokenise.REJECTS).read_text().splitlines()
    )
    assert (reject["line"], reject["reason"]) == (21, "broken JSON")


def test_a_long_document_has_one_bos_and_one_eos(tmp_path, monkeypatch):
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", 50)
    monkeypatch.setattr(long_texts, "BATCH_CHARACTERS", 60)
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    _, documents, tokens = work_on(path, tmp_path / "out")
    ends = np.cumsum(documents["length"]) - 1
    assert np.flatnonzero(tokens == EOS).tolist() == ends.tolist()
    assert np.flatnonzero(tokens == BOS).tolist() == [0, *(ends[:-1] + 1)]
    decode = read_backend(str(tokenizer_folder() / "tokenizer.json")).decode
    cut = np.split(tokens, ends[:-1] + 1)
    assert [decode(ids[1:-1].tolist()) for ids in cut] == TEXTS


def test_only_documents_below_the_limit_are_tokenised(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    report, documents, _ = work_on(path, tmp_path / "out", kept={"book": 0.4})
    kept = [hash_text(text) for text in TEXTS if hash_text(text) < 0.4 * 2**64]
    assert documents["hash"].tolist() == kept
    assert report.domains == {"book": {"documents": 40, "documents_tokenised": len(kept)}}
