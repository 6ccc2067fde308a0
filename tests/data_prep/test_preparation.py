import hashlib
import json

import numpy as np
import pytest
from apex_composer.data_prep import is_prepared, prepare
from apex_composer.data_prep.preparation import limit_text, read_manifest
from corpus import sentences, write_corpus, write_jsonl

OPTIONS = {
    "vocabulary_size": 320,
    "sequence_length": 32,
    "validation_share": 0.2,
    "pretrain_share": 0.4,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    manifest = prepare(write_corpus(folder / "corpus"), folder / "out", **OPTIONS)
    return folder, manifest


def file_hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"  # it has the sources' times
    }


def stored_sequences(folder):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), batch_size=1)
    return [dataset[index]["tokens"] for index in range(len(dataset))]


def test_documents_come_back_from_the_shards(prepared):
    from transformers import AutoTokenizer

    folder, manifest = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")
    texts = {}
    for name, domains in manifest["splits"].items():
        stored = stored_sequences(folder / "out" / name / "github")
        assert all(tokens.shape == (32,) and tokens.dtype == np.uint16 for tokens in stored)
        assert len(stored) == domains["github"]["sequences"]
        whole = tokenizer.decode(np.concatenate(stored)).split(tokenizer.eos_token)
        texts[name] = {part.removeprefix(tokenizer.bos_token) for part in whole[:-1]}
    originals = {sentences(seed) for seed in range(40, 120)}
    assert all(documents <= originals for documents in texts.values())
    assert not texts["validation"] & (texts["train"] | texts["pretrain"])
    # Each split may lose the end of its last document only.
    assert sum(map(len, texts.values())) >= len(originals) - 3


def test_the_manifest_accounts_for_every_token(prepared):
    _, manifest = prepared
    documents = 0
    for domains in manifest["splits"].values():
        for numbers in domains.values():
            written = numbers["sequences"] * 32
            assert numbers["tokens"] == written + numbers["tokens_left_over"]
            assert 0 <= numbers["tokens_left_over"] < 32
            documents += numbers["documents"]
    assert documents == manifest["documents"] == 120
    assert manifest["domains"] == ["book", "github"]


def test_streaming_returns_every_sequence_once(prepared):
    from streaming import Stream, StreamingDataset
    from torch.utils.data import DataLoader

    folder, manifest = prepared
    root = folder / "out" / "pretrain"
    domains = manifest["splits"]["pretrain"]
    streams = [Stream(local=str(root / domain)) for domain in domains]
    dataset = StreamingDataset(streams=streams, batch_size=4, shuffle=True)
    loader = DataLoader(dataset, batch_size=4)
    seen = [bytes(row) for batch in loader for row in batch["tokens"].numpy().astype("uint16")]
    expected = [bytes(row) for domain in domains for row in stored_sequences(root / domain)]
    assert sorted(seen) == sorted(expected)


def test_llm_foundry_reads_it_unchanged(prepared):
    from llmfoundry.data.text_data import StreamingTextDataset
    from transformers import AutoTokenizer

    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")
    local = folder / "out" / "train" / "book"
    dataset = StreamingTextDataset(
        tokenizer=tokenizer, max_seq_len=32, local=str(local), batch_size=1
    )
    stored = stored_sequences(local)
    assert dataset[0].tolist() == stored[0].tolist()
    assert len(dataset) == len(stored)


def test_the_same_input_gives_the_same_bytes(prepared, tmp_path):
    folder, _ = prepared
    prepare(folder / "corpus", tmp_path / "again", **OPTIONS)
    assert file_hashes(tmp_path / "again") == file_hashes(folder / "out")


def test_finished_work_is_recognised(prepared, tmp_path):
    folder, _ = prepared
    corpus, out = folder / "corpus", folder / "out"
    assert is_prepared(corpus, out, **OPTIONS)
    assert not is_prepared(corpus, out, **OPTIONS | {"sequence_length": 64})
    assert not is_prepared(corpus, tmp_path, **OPTIONS)
    assert not is_prepared(write_corpus(tmp_path / "other"), out, **OPTIONS)


def test_only_its_own_output_is_replaced(prepared, tmp_path):
    folder, _ = prepared
    (tmp_path / "theses.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        prepare(folder / "corpus", tmp_path, **OPTIONS, overwrite=True)
    with pytest.raises(FileExistsError, match="already holds prepared data"):
        prepare(folder / "corpus", folder / "out", **OPTIONS)
    assert (tmp_path / "theses.txt").read_text() == "mine"


def test_too_many_bad_lines_stop_it_and_leave_nothing_that_looks_whole(tmp_path):
    write_corpus(tmp_path / "corpus")
    bad = write_jsonl(tmp_path / "corpus" / "book" / "z.jsonl", [b"{"])
    with pytest.raises(ValueError, match=f"{bad}:1: broken JSON"):
        prepare(tmp_path / "corpus", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    manifest = prepare(tmp_path / "corpus", tmp_path / "out", **OPTIONS, maximum_reject_share=0.05)
    assert manifest["rejects"]["lines"] == {"broken JSON": 1}


def test_a_domain_without_a_sequence_in_a_split_is_refused(tmp_path):
    write_corpus(tmp_path / "corpus")
    write_jsonl(tmp_path / "corpus" / "tiny" / "x.jsonl", ["one document"])
    with pytest.raises(ValueError, match=r"tiny/validation \(0 documents, 0 tokens\)"):
        prepare(tmp_path / "corpus", tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sequence_length", 1), ("text_limit", 0), ("maximum_reject_share", 1.0)],
)
def test_settings_are_checked_before_the_data_is_looked_at(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        prepare(tmp_path / "absent", tmp_path / "out", **{option: value})


def test_a_text_limit_is_shared_among_the_domains(prepared, tmp_path):
    folder, whole = prepared
    manifest = prepare(folder / "corpus", tmp_path / "out", **OPTIONS | {"text_limit": 30_000})
    assert manifest["documents"] < whole["documents"]
    assert read_manifest(tmp_path / "out") == json.loads(json.dumps(manifest))


def test_the_text_that_reaches_the_limit_is_the_last():
    assert list(limit_text(iter(["aa", "\u00e9", "c"]), 4)) == ["aa", "\u00e9"]
    assert list(limit_text(iter(["aa", "b"]), None)) == ["aa", "b"]
