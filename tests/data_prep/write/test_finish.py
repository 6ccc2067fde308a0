import json

import pytest
from corpus import sentences, write_corpus, write_jsonl
from prepared import run

from apex_composer.data_prep import read_manifest


def test_too_many_bad_lines_are_listed_and_may_be_allowed_afterwards(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    bad = write_jsonl(corpus / "book" / "z.jsonl", [b"{", b'{"text": null}'])
    with pytest.raises(ValueError, match=f"2 of 242 lines(.|\n)*{bad}:2: no text"):
        run(corpus, tmp_path / "out", max_reject_rate=0.001)
    assert read_manifest(tmp_path / "out") is None
    manifest = run(corpus, tmp_path / "out", max_reject_rate=0.05)
    assert sum(manifest["rejects"]["lines"].values()) == manifest["rejects"]["domains"]["book"] == 2
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert [(e["file"], e["line"]) for e in rejects] == [(str(bad), 1), (str(bad), 2)]


def test_lines_of_rejects_are_counted_from_the_start_of_the_file(tmp_path):
    corpus, bad = tmp_path / "corpus", {7, 41, 150, 199}
    texts = [b"bad" if n in bad else sentences(n) for n in range(1, 201)]
    write_jsonl(corpus / "book" / "x.jsonl", texts)  # in many pieces
    run(corpus, tmp_path / "out", max_reject_rate=0.1, train_tokens=None, cpt_tokens=None)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert {entry["line"] for entry in rejects} == bad
