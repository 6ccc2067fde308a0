import pytest
from corpus import sentences, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose import few_documents
from apex_composer.data_prep.choose.few_documents import SECTIONS, lay_out, read_sections
from apex_composer.data_prep.choose.splits import HASHES, hash_text, make_ranges
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.read.documents import Document
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.demo.split import make_shares

LENGTH = 32
OPTIONS = Options(sequence_length=LENGTH, val_tokens=None, shares=make_shares(0.05, 0.65))
SEQUENCE = few_documents.BYTES_PER_TOKEN * LENGTH
SHORT = "two words"


def lay_out_texts(folder, **domains):
    for domain, texts in domains.items():
        write_jsonl(folder / domain / "x.jsonl", texts)
    return lay_out(find_sources(folder), OPTIONS)


def long_texts(count, seed=0, words=300):
    return [sentences(1000 * seed + number, words=words) for number in range(count)]


def members(texts, bounds):
    return [text for text in texts if bounds[0] <= hash_text(text) < bounds[1]]


@pytest.mark.parametrize("seed", range(5))
def test_few_documents_give_whole_ones_to_validation(tmp_path, seed):
    texts = long_texts(9, seed)
    layout = lay_out_texts(tmp_path, book=texts)
    bounds = layout["few"]["book"]
    held_out = members(texts, bounds["validation"])
    assert len(held_out) == 1  # more than the share of 5 %, and a sequence
    assert sorted(held_out + members(texts, bounds["pretrain"])) == sorted(texts)
    assert bounds["train"] == [HASHES, HASHES]
    assert layout["kept"] == {"book": 1.0} and layout["sections"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_of_two_documents_the_longer_one_is_trained_on(tmp_path, seed):
    texts = [*long_texts(1, seed), *long_texts(1, seed, words=900)]
    bounds = lay_out_texts(tmp_path, book=texts)["few"]["book"]
    assert members(texts, bounds["validation"]) == texts[:1]
    assert members(texts, bounds["pretrain"]) == texts[1:]


@pytest.mark.parametrize(
    "texts", [long_texts(1), [*long_texts(1), SHORT], [SHORT], ["x " * 300] * 9]
)
def test_one_document_is_for_training_only(tmp_path, texts):
    layout = lay_out_texts(tmp_path, book=texts, wikipedia=long_texts(9, 1))
    bounds = layout["few"]["book"]
    assert bounds["validation"] == [0, 0] and bounds["pretrain"] == [0, HASHES]
    assert layout["sections"] == 1


def test_short_documents_are_held_out_until_they_fill_a_sequence(tmp_path):
    texts = long_texts(12, words=20)
    held_out = members(texts, lay_out_texts(tmp_path, a=texts)["few"]["a"]["validation"])
    sizes = sorted(len(text) for text in held_out)
    assert sum(sizes) >= SEQUENCE > sum(sizes[1:])


def test_single_documents_in_all_domains_are_cut_into_sections(tmp_path):
    domains = {"a": long_texts(1, words=2000), "b": [*long_texts(1, 1, words=2000), SHORT]}
    layout = lay_out_texts(tmp_path, **domains)
    assert layout["sections"] == SECTIONS
    held_out = make_ranges(OPTIONS.shares, layout["kept"], layout["few"])["validation"]
    for domain, texts in domains.items():
        documents = (Document(1, domain, text) for text in texts)
        parts = [document.text for document in read_sections(documents, SECTIONS)]
        taken = sum(len(part) for part in parts if held_out.holds(domain, hash_text(part)))
        assert SEQUENCE <= taken <= 0.2 * sum(map(len, texts))


def test_many_documents_are_divided_by_the_shares_and_not_all_read(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        few_documents, "hash_text", lambda text: hashed.append(text) or hash_text(text)
    )
    layout = lay_out_texts(tmp_path, book=long_texts(500), arxiv=long_texts(9, 1))
    assert set(layout["few"]) == {"arxiv"}
    assert len(hashed) < 9 + 300


def test_a_limit_of_text_does_not_drop_the_only_documents(tmp_path):
    for domain in ("a", "b"):
        write_jsonl(tmp_path / domain / "x.jsonl", long_texts(2, ord(domain), words=3000))
    limited = Options(
        sequence_length=LENGTH, val_tokens=None, shares=OPTIONS.shares, text_limit=2000
    )
    layout = lay_out(find_sources(tmp_path), limited)
    assert layout["kept"] == {"a": 1.0, "b": 1.0} and set(layout["few"]) == {"a", "b"}


@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(1, 9))
def test_sections_are_the_document_in_order(text, count):
    parts = [d.text for d in read_sections([Document(1, "a", text)], count)]
    assert "".join(parts).replace(" ", "").replace("\n", "") == "".join(text.split())
    assert len(parts) <= count and (count == 1 or all(part.strip() for part in parts))


def test_sections_end_at_lines_or_else_between_words():
    lines = "one line\n" * 40
    assert all(d.text.endswith("\n") for d in read_sections([Document(1, "a", lines)], 7))
    words = " ".join(["word"] * 40)
    parts = [d.text for d in read_sections([Document(1, "a", words)], 7)]
    assert len(parts) == 7 and all(set(part.split()) == {"word"} for part in parts)
    whole = "x" * 40
    assert "".join(d.text for d in read_sections([Document(1, "a", whole)], 7)) == whole
