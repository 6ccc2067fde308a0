"""What a finetuning loader would do without a word is refused: packed rows, data of another run."""

import json
import shutil

import pytest
from chats import CHATML, LENGTH, instruct, tokenizer_folder, tulu_line, write_records

from apex_composer.callbacks.finetuning_checks import (
    check_examples,
    check_packing,
    finetuning_datasets,
)
from apex_composer.callbacks.prepared_data import PreparedData
from apex_composer.callbacks.start_guard import StartGuard

MPT_TOLD = {"name": "mpt_causal_lm", "attn_config": {"attn_uses_sequence_id": True}}
MPTS = [
    {"name": "mpt_causal_lm"},
    {"name": "mpt_causal_lm", "attn_config": None},
    {"name": "mpt_causal_lm", "attn_config": {"attn_uses_sequence_id": False}},
]


def run_on(folder, *, model=None, tokenizer=None, kwargs=None, evaluated=False, **dataset):
    """A run's configuration, as llm-foundry hands it on, with one finetuning loader."""
    given = {"hf_name": str(folder), "split": "train", "max_seq_len": LENGTH, **dataset}
    finetuning = {"name": "finetuning", "dataset": given}
    text = {"name": "text", "dataset": {"packing_ratio": 9, "hf_name": "elsewhere"}}
    return {
        "model": model or {"name": "hf_causal_lm"},
        "tokenizer": {"name": str(tokenizer or folder / "tokenizer"), "kwargs": kwargs or {}},
        "train_loader": text if evaluated else finetuning,
        "eval_loaders": [text, finetuning] if evaluated else None,
    }


def test_every_finetuning_loader_is_found(tmp_path):
    config = run_on(tmp_path)
    assert [place for place, _ in finetuning_datasets(config)] == ["train_loader.dataset"]
    config |= {"eval_loader": config["train_loader"], "eval_loaders": [config["train_loader"]] * 2}
    places = [place.partition(".")[0] for place, _ in finetuning_datasets(config)]
    assert places == ["train_loader", "eval_loader", "eval_loaders", "eval_loaders"]
    assert not list(finetuning_datasets({}))


@pytest.mark.parametrize("ratio", [2, 1.5, "auto"])
@pytest.mark.parametrize("model", [{"name": "hf_causal_lm"}, *MPTS], ids=str)
def test_packing_is_refused_where_examples_would_see_each_other(model, ratio, tmp_path):
    config = run_on(tmp_path, model=model, packing_ratio=ratio)
    with pytest.raises(ValueError) as error:
        StartGuard(train_config=config)
    told = str(error.value)
    assert f"train_loader.dataset.packing_ratio: got {ratio}," in told
    assert "pad_to_longest: true" in told
    assert ("attn_uses_sequence_id: true" in told) == (model["name"] == "mpt_causal_lm")


@pytest.mark.parametrize(
    ("model", "ratio"),
    [({"name": "hf_causal_lm"}, None), (MPTS[0], 1), (MPTS[0], 1.0), (MPT_TOLD, 4)],
)
def test_what_keeps_examples_apart_passes(model, ratio, tmp_path):
    check_packing(run_on(tmp_path, model=model, packing_ratio=ratio))
    check_packing({"model": model})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_records(folder / "in.jsonl", [tulu_line(number) for number in range(20)])
    manifest = instruct(folder / "in.jsonl", folder / "out")
    counts = [c for sources in manifest["splits"].values() for c in sources.values()]
    return folder / "out", max(count["longest"] for count in counts)


@pytest.mark.parametrize("evaluated", [False, True])
def test_examples_that_would_be_cut_are_refused(prepared, evaluated):
    out, longest = prepared
    assert longest < LENGTH
    PreparedData(train_config=run_on(out, max_seq_len=longest, evaluated=evaluated))
    told = rf"its longest example has {longest} tokens, max_seq_len is {longest - 1}"
    with pytest.raises(ValueError, match=told):
        PreparedData(train_config=run_on(out, max_seq_len=longest - 1, evaluated=evaluated))


def test_the_same_tokenizer_elsewhere_passes(prepared, tmp_path):
    out, _ = prepared
    shutil.copytree(out / "tokenizer", tmp_path / "copy")
    check_examples(run_on(out, tokenizer=tmp_path / "copy", kwargs={"model_max_length": 9}))


@pytest.mark.parametrize(
    ("kind", "template", "told"),
    [
        ("byte level", None, "another chat template"),  # the base model's, without one
        ("byte level", CHATML, "another chat template"),
        ("prepend", None, "another vocabulary"),
    ],
)
def test_another_tokenizer_is_refused(prepared, kind, template, told):
    out, _ = prepared
    with pytest.raises(ValueError, match=told) as error:
        check_examples(run_on(out, tokenizer=tokenizer_folder(kind, template)))
    assert f"Set tokenizer.name: {out / 'tokenizer'}" in str(error.value)


def test_what_a_yaml_gives_the_tokenizer_counts(prepared):
    out, _ = prepared
    with pytest.raises(ValueError, match="another eos"):
        check_examples(run_on(out, kwargs={"eos_token": "<|pad|>"}))


def test_a_tokenizer_that_is_gone_is_said(prepared, tmp_path):
    out, _ = prepared
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer is gone"):
        check_examples(run_on(tmp_path / "out", tokenizer=out / "tokenizer"))


def test_data_of_another_origin_pass(prepared, tmp_path, monkeypatch):
    out, _ = prepared
    for other in ("tatsu-lab/alpaca", "s3://bucket/data", tmp_path):
        check_examples(run_on(other, tokenizer="nowhere", max_seq_len=1))
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "another"}))
    check_examples(run_on(tmp_path, tokenizer="nowhere", max_seq_len=1))
    # MDS shards have no hf_name; the folder that the run is started in is not theirs.
    monkeypatch.chdir(out)
    check_examples(run_on("", tokenizer="nowhere", max_seq_len=1))
