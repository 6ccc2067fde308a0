import json
import sys

import prep_selection
import pytest

from apex_composer.data_prep.choose.document_index import read_corpus, read_hashes
from apex_composer.data_prep.tokens.document_hash import NEWEST_HASH


def test_the_simulated_corpus_has_the_papers_proportions_and_copies(tmp_path):
    plan = prep_selection.simulate(tmp_path, 20_000, NEWEST_HASH)
    corpus = read_corpus(tmp_path, plan)
    cc = corpus.owners == corpus.domains.index("cc")
    assert len(cc) == 20_000 and cc.mean() == pytest.approx(0.67)
    assert corpus.lengths.mean() == pytest.approx(prep_selection.TOKENS, rel=0.02)
    texts = {tuple(row) for row in read_hashes(tmp_path, plan, corpus).tolist()}
    assert 0.93 < len(texts) / 20_000 < 0.97


def test_the_peak_of_every_step_is_measured_and_extrapolated(tmp_path, monkeypatch, capsys):
    sizes, file = [3000, 6000], tmp_path / "numbers.json"
    arguments = ["--documents", *map(str, sizes), "--hashes", NEWEST_HASH, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["prep_selection.py", *arguments])
    prep_selection.main()
    found = json.loads(file.read_text())
    assert list(found) == ["xxh3_128, all", "xxh3_128, budgets"]
    for one in found.values():
        few, many = (one["measured"][str(size)] for size in sizes)
        for step in prep_selection.STEPS:
            assert many["seconds"][step] > 0
        # Lengths and domains at least; hashes and codes too.
        assert many["bytes"]["read"] >= 6 * 6000 and many["bytes"]["choose"] >= 23 * 6000
        for quantity in few:
            slope = (many[quantity]["choose"] - few[quantity]["choose"]) / 3000
            expected = many[quantity]["choose"] + slope * (10**9 - 6000)
            assert one["expected"][quantity]["choose"] == pytest.approx(expected)
    assert "1,000,000,000 documents by the slope: " in capsys.readouterr().out
