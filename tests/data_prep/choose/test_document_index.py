import numpy as np
import pytest
from corpus import write_corpus
from prepared import run

from apex_composer.data_prep import merge
from apex_composer.data_prep.choose import document_index
from apex_composer.data_prep.choose.document_index import Corpus, make_streams
from apex_composer.data_prep.errors import UnfitError
from apex_composer.data_prep.tokens import piece


def test_a_per_domain_validation_set_and_the_rest(prepared, tmp_path):
    folder, _ = prepared
    changes = {"val_per_domain": True, "train_tokens": None, "cpt_tokens": None}
    manifest = run(folder / "corpus", tmp_path / "out", **changes)
    assert {n["sequences"] for n in manifest["splits"]["validation"].values()} == {20}
    assert all(n["tokens_beyond_budget"] == 0 for n in manifest["splits"]["train"].values())
    assert all(read["documents_beyond_budget"] == 0 for read in manifest["read"].values())


@pytest.mark.parametrize("change", [None, lambda rows: rows[:-1], lambda rows: rows + b"\0"])
def test_a_damaged_piece_is_named(tmp_path, change):
    run(write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out", shard=(1, 1))
    folder = tmp_path / "out" / ".work" / "pieces" / "000001"
    if change is None:
        (folder / "report.json").unlink()
    else:
        (folder / "documents.bin").write_bytes(change((folder / "documents.bin").read_bytes()))
    with pytest.raises(ValueError, match=f"The piece {folder} is damaged"):
        merge(tmp_path / "out", workers=1)


def test_pieces_that_together_have_too_many_domains_are_an_error(tmp_path, monkeypatch):
    run(write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out", shard=(1, 1))
    monkeypatch.setattr(piece, "MOST_DOMAINS", 1)
    with pytest.raises(UnfitError, match="The input has more than 1 domains"):
        merge(tmp_path / "out", workers=1)


@pytest.mark.parametrize("at_once", [7, 1 << 17])
def test_a_stream_has_its_documents_in_the_order_of_the_input(monkeypatch, at_once):
    monkeypatch.setattr(document_index, "AT_ONCE", at_once)
    drawn = np.random.default_rng(0)
    codes, owners = drawn.integers(-2, 2, 100).astype(np.int8), drawn.integers(0, 3, 100)
    corpus = Corpus(["a", "b", "c"], drawn.integers(1, 50, 100), owners, np.array([0, 100]), [])
    wanted = {"validation": {"a": 80, "b": 160, "c": 8}, "train": None}
    streams = make_streams(corpus, codes, wanted, 8)
    assert [(s.split, s.domain) for s in streams] == [(w, d) for w in wanted for d in "abc"]
    for number, stream in enumerate(streams):
        own = [n for n in range(100) if (codes[n], owners[n]) == divmod(number, 3)]
        assert stream.documents.tolist() == own and stream.documents.dtype == np.uint32
        assert stream.tokens == corpus.lengths[own].sum()
        most = (wanted[stream.split] or {}).get(stream.domain, stream.tokens)
        assert stream.sequences == min(stream.tokens, most) // 8
        assert stream.tokens // 8 * 8 == stream.sequences * 8 + stream.beyond
