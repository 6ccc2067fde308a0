from unittest import mock

import numpy as np
import pytest
from first_splits import choose_splits_before
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose import splits
from apex_composer.data_prep.choose.splits import BEYOND, DUPLICATE, UNIQUE, choose_splits
from apex_composer.data_prep.errors import ShortfallError
from apex_composer.data_prep.tokens.document_hash import HASHES

DOMAINS = ["a", "b"]
# Few different hashes, so that copies are common, within a domain and across. Of two texts that
# differ the first words may be the same, or the last ones.
rows_of_text = st.tuples(st.integers(0, 8), st.integers(0, 2), st.integers(0, 1))
documents = st.lists(rows_of_text, max_size=60)
budgets = st.fixed_dictionaries(
    {name: st.one_of(st.none(), st.fixed_dictionaries({d: st.integers(0, 30) for d in DOMAINS}))
     for name in ("validation", "train", "cpt")}
).map(lambda wants: {name: wants[name] for name in ("validation", "train", "cpt")})  # fmt: skip


@pytest.fixture(autouse=True, scope="module", params=[(3, 5), (splits.AT_ONCE, splits.RANGES)])
def ranges(request):
    """All documents in one range, and several ranges, as many as there may be where they are."""
    with mock.patch.multiple(splits, AT_ONCE=request.param[0], RANGES=request.param[1]):
        yield


def arrays(rows):
    columns = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    hashes = columns[:, :2] * np.uint64(HASHES // 16)
    # Equal texts have equal lengths.
    lengths = (2 + (3 * columns[:, 0] + columns[:, 1]) % 7).astype(np.uint32)
    return hashes, lengths, columns[:, 2].astype(np.uint16)


def one_word(hashes):
    """64 bits that order and tell apart the texts as their two words do."""
    return hashes[:, 0] + hashes[:, 1] // np.uint64(HASHES // 16)


def choose(rows, wants):
    try:
        return choose_splits(*arrays(rows), DOMAINS, wants)
    except ShortfallError:
        return None


def choose_slowly(rows, wants):
    """One split, one domain and one document after the other, by the rules alone."""
    hashes, lengths, owners = arrays(rows)
    texts, codes, split_of = list(map(tuple, hashes.tolist())), [BEYOND] * len(rows), {}
    for code, (name, want) in enumerate(wants.items()):
        for number, domain in enumerate(DOMAINS):
            own = [n for n in range(len(rows)) if owners[n] == number]
            tokens, last = 0, None
            for n in sorted(own, key=lambda n: (texts[n], n)):
                enough = want is not None and tokens >= want[domain]
                if enough and (texts[n] != last or name == UNIQUE):
                    break
                in_split = split_of.get(texts[n])
                if codes[n] == BEYOND and (in_split is None or in_split == code and name != UNIQUE):
                    codes[n], last, tokens = code, texts[n], tokens + int(lengths[n])
                    split_of[texts[n]] = code
            if want is not None and tokens < want[domain]:
                return None
    copies = [code == BEYOND and text in split_of for code, text in zip(codes, texts, strict=True)]
    return [DUPLICATE if copy else code for copy, code in zip(copies, codes, strict=True)]


@given(documents, budgets)
def test_the_splits_are_those_of_the_rules(rows, wants):
    codes = choose(rows, wants)
    assert (None if codes is None else codes.tolist()) == choose_slowly(rows, wants)


@given(documents, budgets)
def test_what_was_begun_with_64_bits_is_divided_as_it_was(rows, wants):
    hashes, lengths, owners = arrays(rows)
    given = (lengths, owners, DOMAINS, wants)
    try:
        before = choose_splits_before(one_word(hashes), *given)
    except ShortfallError as error:
        with pytest.raises(ShortfallError) as found:
            choose_splits(one_word(hashes)[:, None], *given)
        assert set(found.value.domains) >= set(error.domains[:1])
        return
    assert choose_splits(one_word(hashes)[:, None], *given).tolist() == before.tolist()
    assert choose_splits(hashes, *given).tolist() == before.tolist()


@pytest.mark.parametrize("copies", [1, 1.5])
def test_so_are_many_documents(copies):
    drawn = np.random.default_rng(0)
    texts = drawn.integers(0, HASHES, int(20_000 / copies), dtype=np.uint64)
    hashes = drawn.choice(texts, 20_000) if copies > 1 else texts
    # Of one domain only small hashes were tokenised.
    owners = (drawn.random(20_000) < 0.3).astype(np.uint16) | (hashes > HASHES // 3)
    lengths = (hashes % np.uint64(900)).astype(np.uint32) + 1
    wants = {"validation": {"a": 9000, "b": 80_000}, "train": {"a": 400_000, "b": 3_000_000}}
    for split in (wants, wants | {"cpt": None}, {"train": None}):
        given = (lengths, owners, DOMAINS, split)
        codes = choose_splits(np.stack([hashes, ~hashes], axis=1), *given)
        assert (codes == choose_splits_before(hashes, *given)).all()


@given(documents, budgets)
def test_no_text_is_in_two_splits_and_none_twice_in_validation(rows, wants):
    codes, texts = choose(rows, wants), [row[:2] for row in rows]
    if codes is None:
        return
    for text in set(texts):
        splits = codes[[row == text for row in texts]]
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
                last = member & (one_word(hashes) == one_word(hashes)[member].max())
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
        return sorted((*row, int(code)) for row, code in zip(rows, codes, strict=True))

    assert members(before, rows) == members(after, [rows[index] for index in order])


@given(documents)
def test_what_is_left_over_is_beyond_the_budget_or_a_copy(rows):
    wants = {"validation": {"a": 6, "b": 6}, "train": None}
    codes = choose(rows, wants)
    if codes is not None:
        assert BEYOND not in codes


def test_budgets_of_many_billions_are_counted():
    hashes = np.arange(1, 13, dtype=np.uint64) << np.uint64(60)
    lengths, owners = np.full(12, 2**32 - 1, dtype=np.uint32), np.zeros(12, dtype=np.uint16)
    wants = {"validation": {"a": 2**31, "b": 0}, "train": {"a": 9 * 2**32, "b": 0}}
    codes = choose_splits(hashes[:, None], lengths, owners, DOMAINS, wants)
    assert codes.tolist() == [0, *[1] * 10, BEYOND]
    with pytest.raises(ShortfallError, match=f"needs {11 * 2**32:,} .*has {11 * (2**32 - 1):,}"):
        wants["train"]["a"] = 11 * 2**32
        choose_splits(hashes[:, None], lengths, owners, DOMAINS, wants)


def test_texts_that_share_64_bits_are_different_texts():
    """One of them in validation leaves the other to train."""
    rows = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (1, 2, 1)]
    wants = {"validation": {"a": 2, "b": 0}, "train": None}
    assert choose(rows, wants).tolist() == [0, 1, DUPLICATE, 1, 1]


def test_a_domain_that_is_too_small_is_named_with_its_numbers():
    rows = [(1, 0, 0)] * 20
    with pytest.raises(ShortfallError, match="train/b needs 50 tokens and has 0"):
        choose_splits(*arrays(rows), DOMAINS, {"train": {"a": 10, "b": 50}})
    wants = {"validation": {"a": 6, "b": 0}, "train": {"a": 1, "b": 1}}
    with pytest.raises(
        ShortfallError, match="^validation/a needs 6 .*has 5; train/b .*has 0$"
    ) as e:
        choose_splits(*arrays(rows), DOMAINS, wants)
    assert e.value.domains == ["a", "b"]
