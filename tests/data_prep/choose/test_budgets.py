import pytest
from corpus import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from prepared import LENGTH, run

from apex_composer.data_prep import verify
from apex_composer.data_prep.choose.budgets import divide_sequences
from apex_composer.data_prep.errors import SettingsError


@given(st.integers(0, 10**7), st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_divided_sequences_add_up(total, weights):
    shares = {str(number): weight / sum(weights) for number, weight in enumerate(weights)}
    counts = divide_sequences(total, shares)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - total * shares[name]) <= 1 + 1e-6 * total for name in shares)


def test_too_little_text_names_domain_and_numbers(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=10)
    with pytest.raises(ValueError, match=r"book: 33,280 tokens are wanted, about [\d,]+ are there"):
        run(corpus, tmp_path / "out", cpt_tokens=64_000)
    corpus = write_corpus(tmp_path / "more", documents=80)
    with pytest.raises(ValueError, match=r"cpt/book needs 13,600 tokens and has [\d,]+"):
        run(corpus, tmp_path / "there", cpt_tokens=850 * LENGTH)


def test_a_budget_without_a_sequence_for_some_domain_is_found_before_the_work(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    with pytest.raises(SettingsError, match="no sequence of 32 tokens for validation/github"):
        run(corpus, out, val_tokens=LENGTH, train_tokens=None, cpt_tokens=None)
    assert not (out / ".work" / "pieces").exists()
    run(corpus, out, val_tokens=4 * LENGTH, train_tokens=None, cpt_tokens=None)


def test_small_budgets_leave_most_of_a_large_corpus_untokenised(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=1500)
    manifest = run(corpus, tmp_path / "out", piece_bytes=1 << 20)
    assert all(read["documents_not_tokenised"] > 300 for read in manifest["read"].values())
    assert verify(tmp_path / "out", workers=1) == []
    everything = run(corpus, tmp_path / "all", estimate_margin=1e9, piece_bytes=1 << 20)
    assert everything["shards"] == manifest["shards"]


def test_budgets_are_met_to_the_sequence(prepared):
    _, manifest = prepared
    totals = {
        split: sum(numbers["sequences"] for numbers in domains.values())
        for split, domains in manifest["splits"].items()
    }
    assert totals == {"validation": 20, "train": 60, "cpt": 90}
    assert {n["sequences"] for n in manifest["splits"]["train"].values()} == {20}
