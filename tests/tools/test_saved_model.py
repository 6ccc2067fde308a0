"""Checkpoints that cannot be opened, and models with code of their own."""

from pathlib import Path

import pytest
import torch
from saved_runs import base_folder, load, save, save_sharded, wrapped
from test_mpt import make_mpt
from transformers import AutoModelForCausalLM

from apex_composer.tools.merge import merge
from apex_composer.tools.saved_model import build_empty, open_saved_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(base, tmp_path) -> Path:
    return save(wrapped(load(base)), tmp_path / "ba7.pt", batch=7)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_tells_what_it_is(file, tmp_path, kind):
    path = file if kind == "file" else save_sharded(file, tmp_path / "shards")
    saved = open_saved_model(path)
    assert saved.run == ("run", 7) and saved.huggingface["tokenizer"] == {}
    weights = torch.load(file, weights_only=False)["state"]["model"]
    assert {f"model.{name}" for name in saved.tensors} == weights.keys()
    for name, one in saved.tensors.items():
        weight = weights[f"model.{name}"]
        assert (one.shape, one.dtype) == (weight.shape, weight.dtype)
        assert torch.equal(saved.read(name), weight)


def test_torn_files_and_folders_are_refused(file, tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn.pt cannot be read as a Composer checkpoint"):
        open_saved_model(torn)
    folder = save_sharded(file, tmp_path / "shards")
    (shard,) = folder.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"shards is torn: {shard.name} is missing or too short"):
        open_saved_model(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"shards is torn: {shard.name} is missing"):
        open_saved_model(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="shards has no index .*its save was killed"):
        open_saved_model(folder)
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        open_saved_model(tmp_path / "none.pt")


def test_models_that_are_not_of_hugging_face_are_refused(tmp_path):
    torch.save({"state": {"model": {"w": torch.ones(1)}, "integrations": {}}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no weights of a Hugging Face model"):
        open_saved_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "downloaded", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
        {"model_type": "t5"},
    ],
)
def test_other_models_and_downloaded_code_are_refused(file, changed):
    state = torch.load(file, weights_only=False)["state"]
    state["integrations"]["huggingface"]["model"]["config"]["content"].update(changed)
    torch.save({"state": state}, file)
    told = f"no model can be built .* with model_type {changed['model_type']!r}"
    with pytest.raises(ValueError, match=told):
        build_empty(open_saved_model(file))


@pytest.mark.parametrize(
    "wrapper", ["torch.distributed.fsdp.FullyShardedDataParallel", "transformers.FSDPLlama"]
)
def test_the_class_that_fsdp_makes_of_a_model_is_no_matter(file, wrapper):
    state = torch.load(file, weights_only=False)["state"]
    state["integrations"]["huggingface"]["model"]["config"]["class"] = wrapper
    torch.save({"state": state}, file)
    assert type(build_empty(open_saved_model(file))).__name__ == "LlamaForCausalLM"


def test_mpt_is_saved_with_its_code(tmp_path):
    model = make_mpt({})
    merge([save(wrapped(model), tmp_path / "a.pt")], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    weights, found = model.state_dict(), loaded.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in weights.items())
