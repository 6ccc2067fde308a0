import itertools
import json
from pathlib import Path

import pytest
from corpus import sentences, write_corpus, write_jsonl
from prepared import file_hashes, stored_sequences
from tokenizers import Tokenizer

from apex_composer.data_prep import verify
from apex_composer.data_prep.errors import OutputTakenError
from apex_composer.demo import from_scratch
from apex_composer.demo.from_scratch import prepare_from_scratch


def prepare(corpus, out, vocabulary=320, length=32, workers=1):
    sizes = {"vocabulary_size": vocabulary, "sequence_length": length}
    return prepare_from_scratch(corpus, out, workers=workers, **sizes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_corpus(folder / "corpus")
    texts = {
        "tiny": ["one document"],
        "single": [sentences(1000, 600)],
        "pair": [sentences(1001, 600), sentences(1002, 600)],
    }
    for domain, documents in texts.items():
        write_jsonl(corpus / domain / "x.jsonl", documents)
    return folder, prepare(corpus, folder / "out")


def texts_of(out, split, domain):
    backend = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    stored = stored_sequences(out / split / "train" / domain)
    whole = backend.decode(list(itertools.chain.from_iterable(stored)), skip_special_tokens=False)
    return [text.removeprefix("<|begin_of_text|>") for text in whole.split("<|end_of_text|>")]


def test_every_document_is_in_one_of_the_three_splits(prepared):
    folder, made = prepared
    assert list(made.splits) == ["validation", "pretrain", "train"]
    counts = [n["documents"] for domains in made.splits.values() for n in domains.values()]
    assert sum(counts) + 1 == made.documents == 124  # `tiny` fills no sequence
    assert made.tokenizer["vocabulary_size"] == 320
    whole = [
        {t for domain in domains for t in texts_of(folder / "out", split, domain)[:-1]}
        for split, domains in made.splits.items()
    ]
    assert all(whole) and not set.intersection(*whole) and not whole[1] & whole[2]
    for split in made.splits:
        assert verify(folder / "out" / split, workers=1) == []


def sequences(made, domain):
    return [domains.get(domain, {"sequences": 0})["sequences"] for domains in made.splits.values()]


def test_domains_of_few_documents_end_in_what_they_have(prepared):
    _, made = prepared
    assert made.domains == ["book", "github", "pair", "single", "tiny"] and not made.are_sections
    assert sequences(made, "tiny") == [0, 0, 0]
    held_out, pretrain, train = sequences(made, "single")
    assert held_out == train == 0 and pretrain > 10
    held_out, pretrain, train = sequences(made, "pair")
    assert held_out > 10 and pretrain > 10 and train == 0
    assert min(sequences(made, "book")) > 0


def test_a_domain_may_be_named_as_a_file_of_a_release(tmp_path):
    for number, domain in enumerate(("github_sample", "my_sample")):
        path = tmp_path / "corpus" / domain / "x.jsonl"
        write_jsonl(path, [sentences(100 * number + seed, 40) for seed in range(20)])
    made = prepare(tmp_path / "corpus", tmp_path / "out")
    assert made.domains == list(made.splits["validation"]) == ["github_sample", "my_sample"]


def test_the_same_input_gives_the_same_bytes(prepared, tmp_path):
    folder, made = prepared
    assert prepare(folder / "corpus", tmp_path, workers=2).splits == made.splits
    first, again = file_hashes(folder / "out"), file_hashes(tmp_path)
    # These hold the folder's name.
    differ = {Path(name).name for name in first if again[name] != first[name]}
    assert first.keys() == again.keys() and differ <= {"manifest.json", "made_from.json"}


def test_finished_work_is_done_again_only_for_other_input_or_settings(tmp_path, monkeypatch):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    times = []
    whole = from_scratch.write_text_and_tokenizer
    monkeypatch.setattr(
        from_scratch, "write_text_and_tokenizer", lambda *a: times.append(1) or whole(*a)
    )
    first = prepare(corpus, out)
    assert prepare(corpus, out) == first and len(times) == 1
    assert prepare(corpus, out, 320, 64) != first and len(times) == 2
    assert prepare(corpus, out, 330, 64).tokenizer["vocabulary_size"] == 330
    write_jsonl(corpus / "book" / "book.jsonl", [sentences(seed) for seed in range(200, 250)])
    assert prepare(corpus, out, 330, 64).documents == 130 and len(times) == 4


@pytest.mark.parametrize("step", ["train_tokenizer", "save_tokenizer", "write_json", "prepare"])
def test_what_was_interrupted_goes_on(prepared, tmp_path, monkeypatch, step):
    folder, made = prepared
    prepare(folder / "corpus", tmp_path, 300, 64)
    calls, whole = [], getattr(from_scratch, step)

    def interrupt(*arguments, **options):
        calls.append(step)
        if len(calls) == 2 or step.endswith("tokenizer"):
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(from_scratch, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder / "corpus", tmp_path)
    monkeypatch.undo()
    assert prepare(folder / "corpus", tmp_path).splits == made.splits
    first, again = file_hashes(folder / "out"), file_hashes(tmp_path)
    assert {n for n in first if n.endswith(".mds")} == {n for n in again if n.endswith(".mds")}
    assert all(again[name] == first[name] for name in first if name.endswith(".mds"))


def test_data_of_an_earlier_version_is_replaced_and_anything_else_is_left_alone(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "notes").touch()
    with pytest.raises(OutputTakenError, match="was not written by this command"):
        prepare(corpus, out)
    assert (out / "train" / "notes").exists()
    (out / "manifest.json").write_text(json.dumps({"format": "apex-composer data 0"}))
    prepare(corpus, out)
    assert not (out / "train" / "notes").exists() and not (out / "manifest.json").exists()


@pytest.mark.parametrize("domains", [("book",), ("book", "wikipedia")])
def test_single_documents_are_cut_when_there_is_nothing_else(tmp_path, domains):
    for seed, domain in enumerate(domains):
        write_jsonl(tmp_path / "corpus" / domain / "x.jsonl", [sentences(seed, 5000)])
    made = prepare(tmp_path / "corpus", tmp_path / "out")
    assert made.are_sections and made.documents == 20 * len(domains)
    for domain in domains:
        held_out, pretrain, train = sequences(made, domain)
        assert 0.04 < held_out / (held_out + pretrain + train) < 0.5


def test_the_tokenizer_learns_nothing_from_what_is_held_out(tmp_path, monkeypatch):
    pair = [sentences(1, 600), sentences(2, 600)]
    write_jsonl(tmp_path / "corpus" / "pair" / "x.jsonl", pair)
    learned, whole = [], from_scratch.train_tokenizer

    def listen(texts, size):
        learned.extend(texts)
        return whole(learned, size)

    monkeypatch.setattr(from_scratch, "train_tokenizer", listen)
    prepare(tmp_path / "corpus", tmp_path / "out")
    [held_out] = texts_of(tmp_path / "out", "validation", "pair")
    [other] = (text for text in pair if text not in learned)
    assert len(learned) == 1 and other.startswith(held_out[:500])


def test_the_tokenizer_learns_a_sample_of_every_domain(monkeypatch):
    monkeypatch.setattr(from_scratch, "TOKENIZER_SAMPLE", 20)
    texts = {"a": ["a" * 8, "b" * 8, "c"], "b": ["d"]}
    assert list(from_scratch._sample(texts, {"a": [], "b": ["e"]})) == ["a" * 8, "b" * 8, "d", "e"]


def test_text_that_fills_no_split_is_refused_and_named(tmp_path):
    write_jsonl(tmp_path / "corpus" / "tiny" / "x.jsonl", ["one document"] * 9)
    with pytest.raises(ValueError, match=r"validation: tiny \(0 documents\)"):
        prepare(tmp_path / "corpus", tmp_path / "out")


def test_data_and_output_one_in_the_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lie one in the other"):
        prepare(write_corpus(tmp_path), tmp_path / "runs" / "data")


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sequence_length=1 must be"):
        prepare(tmp_path / "absent", tmp_path / "out", length=1)
    with pytest.raises(ValueError, match="vocabulary_size=9 is too small"):
        prepare(write_corpus(tmp_path / "corpus"), tmp_path / "out", vocabulary=9)
