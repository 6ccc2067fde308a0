import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from corpus import sentences, write_corpus
from prepared import LENGTH, file_hashes, run, small_options, stored_sequences, tokenizer_folder

from apex_composer.data_prep import (
    merge,
    preparation,
    prepare,
    read_manifest,
    verify,
)
from apex_composer.data_prep.errors import OutputTakenError, SettingsError
from apex_composer.data_prep.tokens.document_hash import FIRST_HASH, NEWEST_HASH, read_hash


def texts_of(folder, split, domain):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    whole = tokenizer.decode(np.concatenate(stored_sequences(folder / split / domain)))
    parts = whole.split(tokenizer.eos_token)[:-1]  # the last one may be cut by the budget
    return [part.removeprefix(tokenizer.bos_token) for part in parts]


def test_documents_come_back_whole_and_in_one_split_only(prepared):
    folder, manifest = prepared
    originals = {sentences(seed) for seed in range(240)}
    found = {
        split: [text for domain in domains for text in texts_of(folder / "out", split, domain)]
        for split, domains in manifest["splits"].items()
    }
    assert list(found) == ["validation", "train", "cpt"]
    assert all(found.values()) and all(set(texts) <= originals for texts in found.values())
    assert len(set(found["validation"])) == len(found["validation"])
    assert not set(found["validation"]) & set(found["train"] + found["cpt"])
    assert not set(found["train"]) & set(found["cpt"])


def test_the_smallest_hashes_are_held_out(prepared):
    folder, manifest = prepared
    for domain in manifest["domains"]:
        held_out, rest = (
            list(map(read_hash(NEWEST_HASH), texts_of(folder / "out", split, domain)))
            for split in ("validation", "train")
        )
        assert held_out and max(held_out) < min(rest)


def test_an_array_job_gives_the_same_bytes(prepared, tmp_path):
    folder, _ = prepared
    out = tmp_path / "out"
    for part in (3, 1):
        assert run(folder / "corpus", out, shard=(part, 3)) is None
    with pytest.raises(SettingsError, match="pieces are not done"):
        merge(out, workers=1)
    run(folder / "corpus", out, shard=(2, 3))
    merge(out, workers=1)
    assert file_hashes(out) == file_hashes(folder / "out")
    assert not (out / ".work").exists()
    assert merge(out)["splits"] == read_manifest(out)["splits"]


def test_streaming_returns_every_sequence_once(prepared):
    from streaming import Stream, StreamingDataset
    from torch.utils.data import DataLoader

    folder, manifest = prepared
    root = folder / "out" / "train"
    streams = [Stream(local=str(root / domain)) for domain in manifest["domains"]]
    dataset = StreamingDataset(streams=streams, batch_size=4, shuffle=True)
    loader = DataLoader(dataset, batch_size=4)
    seen = [bytes(row) for batch in loader for row in batch["tokens"].numpy().astype("uint16")]
    expected = [bytes(row) for d in manifest["domains"] for row in stored_sequences(root / d)]
    assert len(expected) == 60 and sorted(seen) == sorted(expected)


def test_llm_foundry_reads_it_unchanged(prepared):
    import yaml
    from llmfoundry.data.text_data import StreamingTextDataset
    from transformers import AutoTokenizer

    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")
    blocks = yaml.safe_load_all((folder / "out" / "streams.yaml").read_text())
    local = [block["streams"]["book"]["local"] for block in blocks][1]
    arguments = {"max_seq_len": LENGTH, "local": local, "batch_size": 1}
    dataset = StreamingTextDataset(tokenizer=tokenizer, **arguments)
    assert dataset[0].tolist() == stored_sequences(folder / "out" / "train" / "book")[0].tolist()
    assert len(dataset) == 20


def test_finished_work_is_not_repeated(prepared):
    folder, manifest = prepared
    before = file_hashes(folder / "out")
    assert run(folder / "corpus", folder / "out") == manifest
    assert file_hashes(folder / "out") == before


def test_input_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    whole = preparation.tokenise_pieces

    def append(*arguments):
        whole(*arguments)
        with (corpus / "book" / "book.jsonl").open("ab") as file:
            file.write(b'{"text": "late"}\n')

    monkeypatch.setattr(preparation, "tokenise_pieces", append)
    with pytest.raises(ValueError, match=r"changed while it was read: .*book\.jsonl has changed"):
        run(corpus, tmp_path / "out")
    assert read_manifest(tmp_path / "out") is None


def test_a_part_is_not_done_under_a_plan_that_another_one_has_replaced(tmp_path, monkeypatch):
    """Of two versions that begin an array job at one moment the last one's plan stays."""
    whole = preparation.tokenise_pieces

    def replace_plan(out, plan, *arguments):
        whole(out, plan, *arguments)
        preparation.write_plan(out, replace(plan, document_hash=FIRST_HASH))

    corpus, out = write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out"
    monkeypatch.setattr(preparation, "tokenise_pieces", replace_plan)
    with pytest.raises(OutputTakenError, match="another one began it with another plan"):
        run(corpus, out, shard=(1, 2))


def test_the_streams_may_be_named_anew_when_all_is_done(prepared, tmp_path):
    folder, _ = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    run(folder / "corpus", out, streams_folder="/elsewhere")
    assert " /elsewhere/train/book\n" in (out / "streams.yaml").read_text()
    assert verify(out, workers=1) == []


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    large = shutil.copytree(tokenizer_folder(), tmp_path / "large")
    description = json.loads((large / "tokenizer.json").read_text())
    unused = {f"unused {number}": number for number in range(320, 65_537)}
    description["model"]["vocab"] |= unused
    (large / "tokenizer.json").write_text(json.dumps(description))
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    options = small_options(train_tokens=None, cpt_tokens=None, shard_bytes=1 << 20)
    manifest = prepare(corpus, tmp_path / "out", tokenizer=large, options=options, workers=1)
    assert manifest["dtype"] == "uint32"
    assert stored_sequences(tmp_path / "out" / "train" / "book")[0].dtype == np.uint32
