import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose.splits import (
    BEYOND,
    DUPLICATE,
    choose_splits,
)
from apex_composer.data_prep.errors import ShortfallError
from apex_composer.data_prep.tokens.document_hash import HASHES

DOMAINS = ["a", "b"]
# Few different hashes, so that copies are common, within a domain and across.
rows_of_text = st.tuples(st.integers(0, 25), st.just(0), st.integers(0, 1))
documents = st.lists(rows_of_text, max_size=60)
budgets = st.fixed_dictionaries(
    {name: st.one_of(st.none(), st.fixed_dictionaries({d: st.integers(0, 30) for d in DOMAINS}))
     for name in ("validation", "train", "cpt")}
).map(lambda wants: {name: wants[name] for name in ("validation", "train", "cpt")})  # fmt: skip


def arrays(rows):
    columns = list(zip(*rows, strict=True)) or [[], [], []]
    hashes = np.array(columns[0], dtype=np.uint64) * np.uint64(HASHES // 32)
    # Equal texts have equal lengths.
    lengths = np.array([2 + value % 7 for value in columns[0]], dtype=np.uint32)
    return hashes, lengths, np.array(columns[2], dtype=np.uint16)


def choose(rows, wants):
    try:
        return choose_splits(*arrays(rows), DOMAINS, wants)
    except ShortfallError:
        return None


@given(documents, budgets)
def test_no_text_is_in_two_splits_and_none_twice_in_validation(rows, wants):
    codes, (hashes, _, _) = choose(rows, wants), arrays(rows)
    if codes is None:
        return
    for digest in set(hashes):
        splits = codes[hashes == digest]
        assert len(set(splits[splits >= 0])) <= 1
        assert (splits == 0).sum() <= 1
        if (splits == DUPLICATE).any():
            assert (splits >= 0).any()


@given(documents, budgets)
def test_budgets_are_met_with_one_text_more_at_most(rows, wants):
    codes, (hashes, lengths, owners) = choose(rows, wants), arrays(rows)
    if codes is None:
        return
    for code, want in enumerate(wants.values()):
        if want is None:
            continue
        for number, domain in enumerate(DOMAINS):
            member = (codes == code) & (owners == number)
            tokens = lengths[member].sum()
            assert tokens >= want[domain]
            if want[domain]:  # all copies of the last text come along
                last = member & (hashes == hashes[member].max())
                assert tokens - lengths[last].sum() < want[domain]


@given(documents, budgets, st.randoms())
def test_the_order_of_the_documents_does_not_matter(rows, wants, random):
    before = choose(rows, wants)
    order = list(range(len(rows)))
    random.shuffle(order)
    after = choose([rows[index] for index in order], wants)
    if before is None:
        assert after is None
        return

    def members(codes, rows):
        return sorted((row[0], row[2], int(code)) for row, code in zip(rows, codes, strict=True))

    assert members(before, rows) == members(after, [rows[index] for index in order])


@given(documents)
def test_what_is_left_over_is_beyond_the_budget_or_a_copy(rows):
    wants = {"validation": {"a": 6, "b": 6}, "train": None}
    codes = choose(rows, wants)
    if codes is not None:
        assert BEYOND not in codes


def test_a_domain_that_is_too_small_is_named_with_its_numbers():
    with pytest.raises(ShortfallError, match="train/b needs 50 tokens and has 0"):
        choose_splits(*arrays([(1, 3, 0)] * 20), DOMAINS, {"train": {"a": 10, "b": 50}})
