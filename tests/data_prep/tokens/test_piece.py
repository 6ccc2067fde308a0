import hashlib
import json
import shutil

import numpy as np
import pytest
from corpus import sentences, write_jsonl
from hub_folders import dolma_record
from prepared import tokenizer_folder

from apex_composer.data_prep.errors import UnfitError
from apex_composer.data_prep.paths import TOKENIZER_FOLDER, piece_folder
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens import long_texts
from apex_composer.data_prep.tokens import piece as tokenise
from apex_composer.data_prep.tokens.document_hash import (
    FIRST_HASH,
    HASH_WORDS,
    NEWEST_HASH,
    read_hash,
)
from apex_composer.data_prep.tokens.piece import PieceTask, document_type, tokenise_piece
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts, read_backend

TEXTS = [sentences(seed, words=10 + 7 * seed) for seed in range(40)]
BOS, EOS = 0, 1


def work_on(path, out, bos=BOS, kept=None, document_hash=NEWEST_HASH, format="jsonl"):
    domain = None if format == "dolma" else "book"
    task = PieceTask(
        out=out,
        number=0,
        source=Source(str(path), domain, format, bytes=0, splittable=False),
        start=0,
        stop=None,
        kept=kept or {},
        tokenizer=TokenizerFacts("t", "", vocabulary_size=320, bos=bos, eos=EOS),
        document_hash=document_hash,
    )
    shutil.copytree(tokenizer_folder(), out / TOKENIZER_FOLDER)
    report, folder = tokenise_piece(task, lambda news: None), piece_folder(out, 0)
    tokens = np.fromfile(folder / tokenise.TOKENS, dtype=np.uint16)
    documents = np.fromfile(folder / tokenise.DOCUMENTS, dtype=document_type(document_hash))
    return report, documents, tokens


def numbers(digests):
    """Hashes as the rows have them: numbers of 64 bits."""
    return [[int.from_bytes(d[n : n + 8], "big") for n in range(0, len(d), 8)] for d in digests]


@pytest.mark.parametrize(("bos", "name"), zip([BOS, None], HASH_WORDS, strict=True))
def test_documents_stand_one_after_the_other_between_bos_and_eos(tmp_path, bos, name):
    path = write_jsonl(tmp_path / "x.jsonl.zst", [*TEXTS[:20], b"bad", *TEXTS[20:]])
    report, documents, tokens = work_on(path, tmp_path / "out", bos=bos, document_hash=name)
    encode = read_backend(str(tokenizer_folder() / "tokenizer.json")).encode
    before = [] if bos is None else [bos]
    expected = [[*before, *encode(text, add_special_tokens=False).ids, EOS] for text in TEXTS]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert documents["length"].tolist() == [len(ids) for ids in expected]
    digests = list(map(read_hash(name), TEXTS))
    assert documents["hash"].tolist() == numbers(digests)
    assert report.content == hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
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


@pytest.mark.parametrize("name", HASH_WORDS)
def test_only_documents_below_the_limit_are_tokenised(tmp_path, name):
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    report, documents, _ = work_on(path, tmp_path / "out", kept={"book": 0.4}, document_hash=name)
    kept = [row for row in numbers(map(read_hash(name), TEXTS)) if row[0] < 0.4 * 2**64]
    assert documents["hash"].tolist() == kept and 5 < len(kept) < 30
    assert report.domains == {"book": {"documents": 40, "documents_tokenised": len(kept)}}


def test_more_domains_than_can_be_numbered_are_an_error(tmp_path, monkeypatch):
    # As many as two bytes tell apart, no fewer.
    assert np.iinfo(document_type(NEWEST_HASH)["domain"]).max + 1 == tokenise.MOST_DOMAINS
    monkeypatch.setattr(tokenise, "MOST_DOMAINS", 3)
    records = [dolma_record(text, f"https://example.org/{n}") for n, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "x.jsonl", records[:3])
    _, documents, _ = work_on(path, tmp_path / "out", format="dolma")
    assert documents["domain"].tolist() == [0, 1, 2]
    write_jsonl(path, records)
    with pytest.raises(UnfitError, match=r"x.jsonl has more than 3 domains.*--format jsonl"):
        work_on(path, tmp_path / "more", format="dolma")


def test_a_row_of_the_first_hash_is_as_it_was():
    before = np.dtype([("hash", "<u8"), ("length", "<u4"), ("domain", "<u2")])
    now, row = document_type(FIRST_HASH), np.array([(2**63 + 5, 7, 3)], dtype=before)
    assert (now.itemsize, document_type(NEWEST_HASH).itemsize) == (14, 22)
    assert np.frombuffer(row.tobytes(), dtype=now).tolist() == [([2**63 + 5], 7, 3)]
