import pytest
from apex_composer.data_prep.split import SPLITS, choose_split, make_shares, unit_interval
from hypothesis import given
from hypothesis import strategies as st

texts = st.text(st.characters(codec="utf-8"), min_size=1)


@given(texts)
def test_the_hash_lies_in_the_unit_interval(text):
    assert 0 <= unit_interval(text) < 1


def test_the_hash_does_not_change_between_versions():
    assert unit_interval("apex") == 0.7418668167067561


@given(st.lists(texts, max_size=20), st.randoms())
def test_the_order_of_documents_does_not_matter(documents, random):
    shares = make_shares(0.2, 0.5)
    before = {text: choose_split(text, shares) for text in documents}
    random.shuffle(documents)
    assert {text: choose_split(text, shares) for text in documents} == before


@given(texts, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_the_share_of_pretraining_does_not_move_validation(text, first, second):
    splits = {choose_split(text, make_shares(0.05, share)) for share in (first, second)}
    assert "validation" not in splits or splits == {"validation"}


@given(texts)
def test_every_document_has_one_of_the_splits(text):
    assert choose_split(text, make_shares(0.05, 0.65)) in SPLITS


def test_splits_have_their_shares():
    shares = make_shares(0.1, 0.6)
    names = [choose_split(str(number), shares) for number in range(10_000)]
    for name, share in shares.items():
        assert names.count(name) / 10_000 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    ("validation", "pretrain", "message"),
    [(0, 0.5, "validation_share=0"), (0.1, 1.0, "pretrain_share=1.0"), (0.4, 0.6, "leave no")],
)
def test_impossible_shares_are_refused(validation, pretrain, message):
    with pytest.raises(ValueError, match=message):
        make_shares(validation, pretrain)
