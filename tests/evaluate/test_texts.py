"""The samples of jsonl and MDS are the tokens that training would see, on every machine alike."""

import json
from pathlib import Path

import pytest
import torch
from chats import chat, pair_line, tulu_line, write_records
from chats import tokenizer_folder as chat_folder
from corpus import sentences, write_corpus, write_jsonl
from prepared import LENGTH, run, tokenizer_folder
from transformers import AutoTokenizer

from apex_composer.data_prep.instruct.chat_template import TULU_TEMPLATE
from apex_composer.evaluate.texts import read_texts

TEXTS = [sentences(seed, 20 + seed) for seed in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tokenizer_folder())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    run(write_corpus(folder / "corpus"), folder / "out", compression="zstd")
    return folder / "out"


def by_hand(tokenizer, texts) -> list[int]:
    """Documents laid end to end."""
    found: list[int] = []
    for text in texts:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [*bos, *ids, tokenizer.eos_token_id]
    return found


def test_documents_are_laid_end_to_end_and_cut(tokenizer, tmp_path):
    for suffix in ("", ".gz", ".zst"):
        write_jsonl(tmp_path / f"a{suffix}" / f"some.jsonl{suffix}", TEXTS)
    expected = by_hand(tokenizer, TEXTS)
    hashes = set()
    for suffix in ("", ".gz", ".zst"):
        file = tmp_path / f"a{suffix}" / f"some.jsonl{suffix}"
        texts = read_texts(file, tokenizer, sequence_length=LENGTH)
        samples = texts.domains["some"]
        assert torch.cat([sample.tokens for sample in samples]).tolist() == expected
        assert [len(sample.tokens) for sample in samples][:-1] == [LENGTH] * (len(samples) - 1)
        assert all(s.answer is None and s.tokens.dtype == torch.int64 for s in samples)
        hashes.add(texts.sha256)
    assert len(hashes) == 1


def test_a_document_may_be_a_sample(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "some.jsonl", TEXTS)
    texts = read_texts(file, tokenizer, sequence_length=LENGTH, cut="documents")
    found = [sample.tokens.tolist() for sample in texts.domains["some"]]
    assert found == [by_hand(tokenizer, [text])[:LENGTH] for text in TEXTS]


def test_every_folder_is_a_domain(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=3)
    texts = read_texts(corpus, tokenizer, sequence_length=LENGTH)
    assert list(texts.domains) == ["book", "github"]
    alone = read_texts(corpus / "book", tokenizer, sequence_length=LENGTH)
    assert list(alone.domains) == ["book"]
    assert [s.tokens.tolist() for s in alone.domains["book"]] == [
        s.tokens.tolist() for s in texts.domains["book"]
    ]
    write_jsonl(corpus / "stray.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"stray.jsonl lies outside of the domains' folders"):
        read_texts(corpus, tokenizer, sequence_length=LENGTH)


def test_shards_of_prep_are_read_as_streaming_reads_them(prepared, tokenizer):
    from prepared import stored_sequences

    texts = read_texts(prepared / "validation", tokenizer, sequence_length=LENGTH)
    assert list(texts.domains) == ["book", "github"]
    alone = read_texts(prepared / "validation" / "book", tokenizer, sequence_length=LENGTH)
    for name, samples in {**texts.domains, "book": alone.domains["book"]}.items():
        stored = stored_sequences(prepared / "validation" / name)
        assert len(samples) == len(stored)
        for sample, expected in zip(samples, stored, strict=True):
            assert sample.tokens.dtype == torch.int64
            assert sample.tokens.tolist() == expected.tolist()


def test_prepared_data_as_a_whole_are_refused(prepared, tokenizer):
    with pytest.raises(ValueError, match="give one split of it: cpt, train, validation"):
        read_texts(prepared, tokenizer, sequence_length=LENGTH)


def test_shards_of_another_tokenizer_or_length_are_refused(prepared, tokenizer):
    other = AutoTokenizer.from_pretrained(chat_folder())
    with pytest.raises(ValueError, match=r"was tokenised with .*the run's tokenizer has"):
        read_texts(prepared / "validation", other, sequence_length=LENGTH)
    with pytest.raises(ValueError, match=f"its sequences have {LENGTH} tokens, max_seq_len is 16"):
        read_texts(prepared / "validation", tokenizer, sequence_length=16)


def test_answers_stand_where_the_slice_says(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder(template=TULU_TEMPLATE))
    write_records(tmp_path / "a" / "pairs.jsonl", [pair_line(n) for n in range(4)])
    turns = chat("One?", "First.", "Two?", "Second.")
    write_records(tmp_path / "b" / "chats.jsonl", [{"messages": turns}])
    texts = read_texts(tmp_path, tokenizer, sequence_length=128)
    for number, (tokens, answer) in enumerate(texts.domains["a"]):
        pair = pair_line(number)
        ids = tokenizer(pair["response"], add_special_tokens=False)["input_ids"]
        assert tokens[answer].tolist() == [*ids, tokenizer.eos_token_id]
        assert tokens[: answer.start].tolist() == tokenizer(pair["prompt"])["input_ids"]
        assert answer.stop == len(tokens)
    first, second = texts.domains["b"]
    eos = tokenizer.eos_token
    assert tokenizer.decode(first.tokens[first.answer]) == f"First.{eos}"
    assert tokenizer.decode(second.tokens[second.answer]) == f"Second.{eos}"
    assert second.tokens[: len(first.tokens)].tolist() == first.tokens.tolist()


def test_what_is_left_out_is_counted(tokenizer, tmp_path, caplog):
    lines = [*TEXTS[:2], json.dumps({"text": " "}).encode(), b"{", json.dumps({}).encode()]
    texts = read_texts(write_jsonl(tmp_path / "a.jsonl", lines), tokenizer, sequence_length=LENGTH)
    assert texts.left_out == {
        "empty text": 1,
        "broken JSON": 1,
        "no messages, and no prompt with a response": 1,
    }
    assert "left out 1 (broken JSON)" in caplog.text
    only = write_jsonl(tmp_path / "only.jsonl", lines[2:])
    with pytest.raises(ValueError, match=r"no text in only. Left out: 1 \(broken JSON\)"):
        read_texts(only, tokenizer, sequence_length=LENGTH)


def test_answers_that_are_too_long_are_left_out_and_never_cut(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder(template=TULU_TEMPLATE))
    long = {"prompt": "Count", "response": sentences(1, 200)}
    file = write_records(tmp_path / "a.jsonl", [pair_line(1), long, tulu_line(1)])
    texts = read_texts(file, tokenizer, sequence_length=128)
    assert texts.left_out == {"longer than the sequence length": 1}


def test_texts_beside_answers_are_refused(tokenizer, tmp_path):
    file = write_records(tmp_path / "a.jsonl", [{"text": "a b"}, pair_line(1)])
    with pytest.raises(ValueError, match="holds texts and prompts with answers"):
        read_texts(file, tokenizer, sequence_length=128)


@pytest.mark.parametrize("cut", ["sequences", "documents"])
def test_a_choice_depends_on_the_seed_alone(tokenizer, tmp_path, cut):
    corpus = write_corpus(tmp_path / "corpus", documents=20)
    options = {"sequence_length": LENGTH, "cut": cut}
    everything = read_texts(corpus, tokenizer, **options)
    some = read_texts(corpus, tokenizer, samples=12, seed=1, **options)
    counts = {name: len(samples) for name, samples in some.domains.items()}
    assert counts == {"book": 4, "github": 8}
    assert some.sha256 == read_texts(corpus, tokenizer, samples=12, seed=1, **options).sha256
    assert some.sha256 != read_texts(corpus, tokenizer, samples=12, seed=2, **options).sha256
    for name, samples in some.domains.items():
        whole = [sample.tokens.tolist() for sample in everything.domains[name]]
        chosen = [whole.index(sample.tokens.tolist()) for sample in samples]
        assert chosen == sorted(set(chosen))
    many = read_texts(corpus, tokenizer, samples=10_000, **options)
    assert many.sha256 == everything.sha256


def test_the_choice_is_the_same_on_every_machine(tokenizer, prepared):
    texts = read_texts(prepared / "validation", tokenizer, sequence_length=LENGTH, samples=5)
    places = {name: rows.places for name, rows in texts.domains.items()}
    assert places == {"book": [0, 4, 6], "github": [6, 8]}


def test_settings_are_checked(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=2)
    for settings, message in (
        ({"samples": 1}, "samples=1 must be 2 at least, one for each domain"),
        ({"samples": 0}, "samples=0 must be 1 at least"),
        ({"sequence_length": 1}, "sequence_length=1 must be 2 at least"),
        ({"cut": "pages"}, "cut='pages' must be sequences or documents"),
    ):
        with pytest.raises(ValueError, match=message):
            read_texts(corpus, tokenizer, **{"sequence_length": LENGTH, **settings})
    with pytest.raises(FileNotFoundError, match="none' does not exist"):
        read_texts(tmp_path / "none", tokenizer, sequence_length=LENGTH)
