import pytest
from corpus import write_corpus
from prepared import small_options, tokenizer_folder

from apex_composer.data_prep import prepare
from apex_composer.data_prep.dry_run import (
    check_needs,
    estimate_preparation,
    show_hours,
)


def estimate(corpus, out, **options):
    given = {"tokenizer": tokenizer_folder(), "workers": 1, "options": small_options(**options)}
    return estimate_preparation(corpus, out, **given)


def test_budgets_that_the_text_cannot_fill_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    check_needs(estimate(corpus, tmp_path / "out"), tmp_path / "out")
    with pytest.raises(ValueError, match="Too little text: book: "):
        check_needs(estimate(corpus, tmp_path / "out", cpt_tokens=10**6), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_estimates_of_every_kind_of_file_are_close(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    options = {"val_tokens": None, "train_tokens": None, "cpt_tokens": None}
    needs = estimate(corpus, tmp_path / "out", **options)
    given = {"tokenizer": tokenizer_folder(), "workers": 1, "options": small_options(**options)}
    manifest = prepare(corpus, tmp_path / "out", **given)
    for domain, found in needs.domains.items():
        assert found.tokens == pytest.approx(manifest["read"][domain]["tokens"], rel=0.05)


def test_durations_have_the_unit_that_fits():
    assert [show_hours(hours) for hours in (2, 0.5, 0.01)] == [
        "2.0 hours", "30.0 minutes", "36.0 seconds",
    ]  # fmt: skip
