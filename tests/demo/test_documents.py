import json

import pytest
from corpus import sentences, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.read.sources import find_sources
from apex_composer.demo import documents
from apex_composer.demo.documents import (
    LEAST_DOCUMENTS,
    PRETRAIN,
    SECTIONS,
    TRAIN,
    VALIDATION,
    cut,
    divide,
    divide_domain,
    take_documents,
)

LENGTH = 32
SEQUENCE = documents.BYTES_PER_TOKEN * LENGTH
SHORT = "two words"


def long_texts(count, seed=0, words=300):
    return [sentences(1000 * seed + number, words=words) for number in range(count)]


def size(texts):
    return sum(map(len, texts))


@pytest.mark.parametrize("seed", range(5))
def test_few_documents_give_whole_ones_to_validation(seed):
    texts = long_texts(9, seed, words=100)
    divided = divide_domain(texts, LENGTH)
    assert len(divided[VALIDATION]) == 1  # more than the share of 5 %, and a sequence
    assert sorted(divided[VALIDATION] + divided[PRETRAIN]) == sorted(texts)
    assert divided[TRAIN] == []


@pytest.mark.parametrize("seed", range(4))
def test_of_two_documents_the_longer_one_is_trained_on(seed):
    texts = [*long_texts(1, seed), *long_texts(1, seed, words=900)]
    divided = divide_domain(texts, LENGTH)
    assert divided == {VALIDATION: texts[:1], PRETRAIN: texts[1:], TRAIN: []}


@pytest.mark.parametrize(
    "texts", [long_texts(1), [*long_texts(1), SHORT], [SHORT], ["x " * 300] * 9]
)
def test_one_document_is_for_training_only(texts):
    divided, are_sections = divide({"book": texts, "wikipedia": long_texts(9, 1)}, LENGTH)
    assert divided[VALIDATION]["book"] == divided[TRAIN]["book"] == []
    assert set(divided[PRETRAIN]["book"]) == set(texts)
    assert not are_sections


def test_short_documents_are_held_out_until_they_fill_a_sequence():
    held_out = divide_domain(long_texts(12, words=20), LENGTH)[VALIDATION]
    assert size(held_out) >= SEQUENCE > size(held_out[:-1])


def test_many_documents_are_divided_by_the_shares():
    texts = long_texts(300)
    divided = divide_domain(texts, LENGTH)
    assert sorted(sum(divided.values(), [])) == sorted(texts)
    shares = [size(part) / size(texts) for part in divided.values()]
    assert shares == pytest.approx([0.05, 0.65, 0.30], abs=0.01)
    assert divided == divide_domain(texts[::-1], LENGTH)


def test_single_documents_in_all_domains_are_cut_into_sections():
    domains = {"a": long_texts(1, words=2000), "b": [*long_texts(1, 1, words=2000), SHORT]}
    divided, are_sections = divide(domains, LENGTH)
    assert are_sections
    for domain, texts in domains.items():
        assert SEQUENCE <= size(divided[VALIDATION][domain]) <= 0.2 * size(texts)
        assert sum(len(part[domain]) for part in divided.values()) >= SECTIONS


TEXTS = st.lists(st.text("ab", max_size=9).map(lambda text: text * 40), max_size=9)


@given(st.dictionaries(st.sampled_from("xyz"), TEXTS))
def test_no_text_is_in_two_splits_or_there_twice(texts):
    divided, _ = divide(texts, 2)
    found = [text for domains in divided.values() for own in domains.values() for text in own]
    assert len(set(found)) == len(found)


@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(1, 9))
def test_sections_are_the_document_in_order(text, count):
    parts = list(cut(text, count))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert len(parts) <= count and (count == 1 or all(part.strip() for part in parts))


def test_sections_end_at_lines_or_else_between_words():
    assert all(part.endswith("\n") for part in cut("one line\n" * 40, 7))
    parts = list(cut(" ".join(["word"] * 40), 7))
    assert len(parts) == 7 and all(set(part.split()) == {"word"} for part in parts)
    whole = "x" * 40
    assert "".join(cut(whole, 7)) == whole


def take(folder, limit, **domains):
    for domain, texts in domains.items():
        for number, lines in enumerate(texts):
            write_jsonl(folder / domain / f"{number}.jsonl", lines)
    return take_documents(find_sources(folder), limit)


def test_a_limit_is_shared_among_the_domains_and_ends_the_reading(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(documents, "read_documents", lambda source, *_: read.append(source) or [])
    texts = long_texts(60, words=100)
    limit = 2 * size(texts[:20])
    take(tmp_path, limit, a=[texts], b=[texts[:30], texts[30:]])
    assert len(read) == 3
    monkeypatch.undo()
    taken = take(tmp_path, limit)
    assert [len(own) for own in taken.values()] == [20, 20]
    assert taken["b"] == texts[:20]


def test_a_limit_does_not_drop_the_only_documents(tmp_path):
    texts = long_texts(2 * LEAST_DOCUMENTS)
    taken = take(tmp_path, 2000, a=[texts[:2]], b=[texts])
    assert taken == {"a": texts[:2], "b": texts[:LEAST_DOCUMENTS]}


def test_a_domain_that_comes_late_in_a_file_is_taken_too(tmp_path):
    lines = [("C4", "x" * 10_000)] * 200 + [("Book", SHORT)]
    records = [{"text": t, "meta": {"redpajama_set_name": f"RedPajama{d}"}} for d, t in lines]
    write_jsonl(tmp_path / "x.jsonl.zst", [json.dumps(record).encode() for record in records])
    taken = take_documents(find_sources(tmp_path, "slimpajama"), 10**7)
    assert len(taken["c4"]) == 200 and taken["book"] == [SHORT]


def test_unusable_lines_are_counted_and_named(tmp_path, capsys):
    texts = [f"{SHORT} {number}" for number in range(1000)]
    taken = take(tmp_path, 10**6, a=[[*texts, b"{"]], b=[[]])
    assert taken == {"a": texts, "b": []}
    assert "1 of 1001 lines are not usable" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"2 of 1002 lines(.|\n)*b/0\.jsonl:1: broken JSON"):
        take(tmp_path, 10**6, b=[[b"{"]])
