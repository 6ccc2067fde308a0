import json

import pytest
from corpus import write_corpus, write_jsonl
from prepared import file_hashes

from apex_composer.data_prep import is_prepared, prepare_from_scratch, verify

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


def test_a_domain_without_a_sequence_in_a_split_is_refused(tmp_path):
    write_corpus(tmp_path / "corpus")
    write_jsonl(tmp_path / "corpus" / "tiny" / "x.jsonl", ["one document"])
    with pytest.raises(ValueError, match=r"tiny/validation \(0 documents, 0 tokens\)"):
        prepare_from_scratch(tmp_path / "corpus", tmp_path / "out", workers=1, **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sequence_length", 1), ("text_limit", 0), ("max_reject_rate", 1.0), ("vocabulary_size", 9)],
)
def test_settings_are_checked_before_the_data_is_looked_at(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        prepare_from_scratch(tmp_path / "absent", tmp_path / "out", **{setting: value})
