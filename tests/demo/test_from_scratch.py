import itertools
import json
from pathlib import Path

import pytest
import yaml
from corpus import sentences, write_corpus, write_jsonl
from prepared import file_hashes, stored_sequences
from tokenizers import Tokenizer

from apex_composer.data_prep import verify
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.demo.from_scratch import (
    DEFAULTS,
    is_prepared,
    make_options,
    prepare_from_scratch,
    training_texts,
)

SETTINGS = {
    "vocabulary_size": 320,
    "sequence_length": 32,
    "validation_share": 0.2,
    "pretrain_share": 0.4,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_corpus(folder / "corpus")
    return folder, prepare_from_scratch(corpus, folder / "out", workers=1, **SETTINGS)


def test_every_document_is_in_one_of_the_three_splits(prepared):
    folder, manifest = prepared
    assert list(manifest["splits"]) == ["validation", "pretrain", "train"]
    counts = [n["documents"] for domains in manifest["splits"].values() for n in domains.values()]
    assert sum(counts) == manifest["documents"] == 120
    assert manifest["tokenizer"]["vocabulary_size"] == 320
    assert verify(folder / "out", workers=1) == []


def test_the_same_input_gives_the_same_bytes(prepared, tmp_path):
    folder, _ = prepared
    prepare_from_scratch(folder / "corpus", tmp_path / "again", workers=2, **SETTINGS)
    assert file_hashes(tmp_path / "again") == file_hashes(folder / "out")


def test_finished_work_is_recognised(prepared, tmp_path):
    folder, _ = prepared
    corpus, out = folder / "corpus", folder / "out"
    assert is_prepared(corpus, out, **SETTINGS)
    assert not is_prepared(corpus, out, **SETTINGS | {"sequence_length": 64})
    assert not is_prepared(corpus, out, **SETTINGS | {"vocabulary_size": 330})
    assert not is_prepared(corpus, tmp_path, **SETTINGS)
    assert not is_prepared(write_corpus(tmp_path / "other"), out, **SETTINGS)
    manifest = json.loads((out / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(
        json.dumps(manifest | {"format": "apex-composer data 0"})
    )
    assert not is_prepared(corpus, tmp_path, **SETTINGS)


def test_a_text_limit_is_shared_among_the_domains(prepared, tmp_path):
    folder, whole = prepared
    settings = SETTINGS | {"text_limit": 40_000}
    manifest = prepare_from_scratch(folder / "corpus", tmp_path / "out", workers=1, **settings)
    tokens = [
        sum(domains[name]["tokens"] for domains in manifest["splits"].values())
        for name in whole["domains"]
    ]
    assert max(tokens) < 1.5 * min(tokens)
    assert sum(tokens) < 0.8 * sum(read["tokens"] for read in whole["read"].values())


def sequences(manifest, domain):
    return [domains[domain]["sequences"] for domains in manifest["splits"].values()]


def test_domains_of_few_documents_end_in_what_they_have(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    texts = {
        "tiny": ["one document"],
        "single": [sentences(1000, 600)],
        "pair": [sentences(1001, 600), sentences(1002, 600)],
    }
    for domain, documents in texts.items():
        write_jsonl(corpus / domain / "x.jsonl", documents)
    manifest = prepare_from_scratch(corpus, tmp_path / "out", workers=1, **SETTINGS)
    assert verify(tmp_path / "out", workers=1) == []
    assert is_prepared(corpus, tmp_path / "out", **SETTINGS)
    assert sequences(manifest, "tiny") == [0, 0, 0]
    held_out, pretrain, train = sequences(manifest, "single")
    assert held_out == train == 0 and pretrain > 10
    held_out, pretrain, train = sequences(manifest, "pair")
    assert held_out > 10 and pretrain > 10 and train == 0
    assert min(sequences(manifest, "book")) > 0
    blocks = list(yaml.safe_load_all((tmp_path / "out" / "streams.yaml").read_text()))
    assert [set(block["streams"]) for block in blocks] == [
        {"book", "github", "pair"},
        {"book", "github", "pair", "single"},
        {"book", "github"},
    ]
    named = [stream["local"] for block in blocks for stream in block["streams"].values()]
    assert all((Path(folder) / "index.json").is_file() for folder in named)


@pytest.mark.parametrize("domains", [("book",), ("book", "wikipedia")])
def test_single_documents_are_cut_when_there_is_nothing_else(tmp_path, domains):
    for seed, domain in enumerate(domains):
        write_jsonl(tmp_path / "corpus" / domain / "x.jsonl", [sentences(seed, 5000)])
    out = tmp_path / "out"
    manifest = prepare_from_scratch(tmp_path / "corpus", out, workers=1, **SETTINGS)
    assert verify(out, workers=1) == []
    assert manifest["sections"] == manifest["documents"] / len(domains) == 20
    for domain in domains:
        held_out, pretrain, train = sequences(manifest, domain)
        assert 0.1 < held_out / (held_out + pretrain + train) < 0.5


def test_the_tokenizer_learns_nothing_from_what_is_held_out(tmp_path):
    pair = [sentences(1, 600), sentences(2, 600)]
    write_jsonl(tmp_path / "corpus" / "pair" / "x.jsonl", pair)
    sources, options = find_sources(tmp_path / "corpus"), make_options(DEFAULTS | SETTINGS)
    learned = list(training_texts(sources, options, 8_000_000))
    prepare_from_scratch(tmp_path / "corpus", tmp_path / "out", workers=1, **SETTINGS)
    backend = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    stored = stored_sequences(tmp_path / "out" / "validation" / "pair")
    held_out = backend.decode(list(itertools.chain.from_iterable(stored)))
    assert len(learned) == 1 and held_out[:500] in next(t for t in pair if t not in learned)


def test_text_that_fills_no_split_is_refused_and_named(tmp_path):
    write_jsonl(tmp_path / "corpus" / "tiny" / "x.jsonl", ["one document"] * 9)
    with pytest.raises(ValueError, match=r"tiny/validation \(0 documents, 0 tokens\)"):
        prepare_from_scratch(tmp_path / "corpus", tmp_path / "out", workers=1, **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sequence_length", 1), ("text_limit", 0), ("max_reject_rate", 1.0), ("vocabulary_size", 9)],
)
def test_settings_are_checked_before_the_data_is_looked_at(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        prepare_from_scratch(tmp_path / "absent", tmp_path / "out", **{setting: value})
