import json
import shutil

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
from apex_composer.data_prep.errors import SettingsError


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


def test_budgets_are_met_to_the_sequence(prepared):
    _, manifest = prepared
    totals = {
        split: sum(numbers["sequences"] for numbers in domains.values())
        for split, domains in manifest["splits"].items()
    }
    assert totals == {"validation": 20, "train": 60, "cpt": 90}
    assert {n["sequences"] for n in manifest["splits"]["train"].values()} == {20}


def test_the_number_of_workers_changes_no_byte(prepared, tmp_path):
    folder, _ = prepared
    run(folder / "corpus", tmp_path / "out", workers=3)
    assert file_hashes(tmp_path / "out") == file_hashes(folder / "out")


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


def test_the_size_of_pieces_moves_no_document(prepared, tmp_path):
    folder, manifest = prepared
    other = run(folder / "corpus", tmp_path / "out", piece_bytes=1 << 20)
    assert other["splits"] == manifest["splits"] and other["shards"] == manifest["shards"]


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


def test_other_options_and_other_input_are_refused_by_name(prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(SettingsError, match="train_tokens was 1920 and is now 960"):
        run(folder / "corpus", folder / "out", train_tokens=960)
    other = write_corpus(tmp_path / "corpus", documents=80)
    with pytest.raises(SettingsError, match="is gone"):
        run(other, folder / "out")


def test_a_begun_preparation_is_only_continued_with_the_same_options(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    run(corpus, tmp_path / "out", shard=(1, 2))
    with pytest.raises(SettingsError, match="sequence_length was 32 and is now 16"):
        run(corpus, tmp_path / "out", sequence_length=16)


def test_a_begun_preparation_is_not_continued_with_another_end_of_documents(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=80)
    run(corpus, tmp_path / "out", shard=(1, 2))
    other = shutil.copytree(tokenizer_folder(), tmp_path / "tokenizer")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["pad_token"]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(SettingsError, match="the tokenizer's eos was 1 and is now 2"):
        prepare(corpus, tmp_path / "out", tokenizer=other, options=small_options(), workers=1)


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


def test_too_little_text_names_domain_and_numbers(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=10)
    with pytest.raises(ValueError, match=r"book: 33,280 tokens are wanted, about [\d,]+ are there"):
        run(corpus, tmp_path / "out", cpt_tokens=64_000)
    corpus = write_corpus(tmp_path / "more", documents=80)
    with pytest.raises(ValueError, match=r"cpt/book needs 13,600 tokens and has [\d,]+"):
        run(corpus, tmp_path / "there", cpt_tokens=850 * LENGTH)


def test_a_budget_without_a_sequence_for_some_domain_is_found_before_the_work(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    with pytest.raises(SettingsError, match="no sequence of 32 tokens for validation/github"):
        run(corpus, out, val_tokens=LENGTH, train_tokens=None, cpt_tokens=None)
    assert not (out / ".work" / "pieces").exists()
    run(corpus, out, val_tokens=4 * LENGTH, train_tokens=None, cpt_tokens=None)


def test_the_streams_may_be_named_anew_when_all_is_done(prepared, tmp_path):
    folder, _ = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    run(folder / "corpus", out, streams_folder="/elsewhere")
    assert '"/elsewhere/train/book"' in (out / "streams.yaml").read_text()
    assert verify(out, workers=1) == []


def test_a_per_domain_validation_set_and_the_rest(prepared, tmp_path):
    folder, _ = prepared
    changes = {"val_per_domain": True, "train_tokens": None, "cpt_tokens": None}
    manifest = run(folder / "corpus", tmp_path / "out", **changes)
    assert {n["sequences"] for n in manifest["splits"]["validation"].values()} == {20}
    assert all(n["tokens_beyond_budget"] == 0 for n in manifest["splits"]["train"].values())
    assert all(read["documents_beyond_budget"] == 0 for read in manifest["read"].values())


def test_small_budgets_leave_most_of_a_large_corpus_untokenised(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=1500)
    manifest = run(corpus, tmp_path / "out", piece_bytes=1 << 20)
    assert all(read["documents_not_tokenised"] > 300 for read in manifest["read"].values())
    assert verify(tmp_path / "out", workers=1) == []
    everything = run(corpus, tmp_path / "all", estimate_margin=1e9, piece_bytes=1 << 20)
    assert everything["shards"] == manifest["shards"]


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
