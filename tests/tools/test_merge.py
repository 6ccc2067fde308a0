"""Means of checkpoints: their arithmetic, and the folder that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from composer_run import run
from helpers import tiny_llama
from safetensors import safe_open
from saved_runs import (
    TEMPLATE,
    assert_loads_equal,
    base_folder,
    load,
    noisy,
    save,
    save_run,
    save_sharded,
    tokenizer_of,
    wrapped,
)
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from apex_composer import APEX
from apex_composer.tools import merge as merging
from apex_composer.tools.merge import mean, merge
from apex_composer.tools.saved_model import SavedModel


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def checkpoints(base, tmp_path) -> list[Path]:
    return save_run(base, tmp_path, 3)


def weights_of(path: Path) -> dict:
    state = torch.load(path, weights_only=False)["state"]["model"]
    return {name.removeprefix("model."): weight for name, weight in state.items()}


def reference(paths: list[Path], dtype: torch.dtype) -> dict:
    """The obvious mean: all in float64, rounded once."""
    all_weights = [weights_of(path) for path in paths]
    return {
        name: (sum(weights[name].double() for weights in all_weights) / len(paths)).to(dtype)
        for name in all_weights[0]
    }


def in_memory(*tensors: torch.Tensor) -> list[SavedModel]:
    """Models of one weight, `w`."""
    return [
        SavedModel(Path(str(n)), (None, None), {}, {"w": one}, lambda _, one=one: one)
        for n, one in enumerate(tensors)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5, 7), (21,)])
def test_a_mean_is_rounded_once(dtype, shape, monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK", 10)  # several, and a rest
    parts = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3)]
    kept = [part.clone() for part in parts]
    found = mean(in_memory(*parts), "w", dtype)
    assert found.dtype == dtype and found.shape == shape
    assert torch.equal(found, ((kept[0].double() + kept[1] + kept[2]) / 3).to(dtype))
    assert all(map(torch.equal, parts, kept))


def test_sums_of_float32_are_not_rounded():
    parts = [torch.tensor([value]) for value in (1.0, 2.0**-25, 2.0**-25, 2.0**-25, 2.0**-25)]
    # float32 would drop every addend after the first and give 0.2.
    assert mean(in_memory(*parts), "w", torch.float64).item() == (1 + 2.0**-23) / 5


def test_the_mean_of_one_is_that_one():
    bits = torch.tensor([0.0, -0.0, 1e-45, -1.5], dtype=torch.float32)
    found = mean(in_memory(bits), "w", torch.float32)
    assert torch.equal(found.view(torch.int32), bits.view(torch.int32))


def test_a_mean_that_is_not_finite_names_its_checkpoint():
    models = in_memory(torch.ones(2), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="w: its mean is not finite in .*float32: look at 1$"):
        mean(models, "w", torch.float32)
    with pytest.raises(ValueError, match="in torch.float16: give another --dtype"):
        mean(in_memory(torch.full((1,), 1e6)), "w", torch.float16)


def test_the_folder_is_what_transformers_loads(checkpoints, base, tmp_path):
    notes = merge(checkpoints, tmp_path / "out", base=str(base))
    assert notes == []
    assert_loads_equal(tmp_path / "out", reference(checkpoints, torch.float32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "float32"
    kept, given = (GenerationConfig.from_pretrained(f) for f in (tmp_path / "out", base))
    assert kept.temperature == 0.5 and kept.to_dict() == given.to_dict()
    tokenizer = tokenizer_of(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("w3 w4").input_ids == tokenizer_of(base)("w3 w4").input_ids
    assert tokenizer.eos_token == "<eos>"


def test_one_checkpoint_keeps_its_bits_in_several_files(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_SHARD", "20KB")
    (note,) = merge(checkpoints[:1], tmp_path / "out")
    assert "no --base was given" in note
    assert_loads_equal(tmp_path / "out", weights_of(checkpoints[0]))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 3


@pytest.mark.parametrize("kind", ["sharded", "both"])
def test_sharded_checkpoints_give_the_same(checkpoints, tmp_path, kind):
    folders = [save_sharded(path, tmp_path / path.stem) for path in checkpoints]
    given = folders if kind == "sharded" else [*checkpoints[:2], folders[2]]
    merge(given, tmp_path / "out")
    assert_loads_equal(tmp_path / "out", reference(checkpoints, torch.float32))


def test_another_dtype(checkpoints, tmp_path):
    merge(checkpoints, tmp_path / "out", dtype="bfloat16")
    assert_loads_equal(tmp_path / "out", reference(checkpoints, torch.bfloat16))


def test_checkpoints_in_bf16_stay_in_it(base, tmp_path):
    models = [noisy(load(base).bfloat16(), n) for n in range(2)]
    paths = [save(wrapped(m), tmp_path / f"{n}.pt", batch=n) for n, m in enumerate(models)]
    notes = merge(paths, tmp_path / "out")
    assert "The checkpoints hold no tokenizer: add that of the run to the folder" in notes
    assert_loads_equal(tmp_path / "out", reference(paths, torch.bfloat16))
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_tied_weights_are_written_once(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    models = [GPT2LMHeadModel(config), tiny_llama(tie_word_embeddings=True)]
    names = ("transformer.wte.weight", "model.embed_tokens.weight")
    for model, name in zip(models, names, strict=True):
        kind = tmp_path / type(model).__name__
        kind.mkdir()
        paths = [
            save(wrapped(noisy(model, n)), kind / f"{n}.pt", batch=n, run="a") for n in range(2)
        ]
        merge(paths, kind / "out")
        with safe_open(kind / "out" / "model.safetensors", "pt") as file:
            assert name in file.keys() and "lm_head.weight" not in file.keys()
        assert_loads_equal(kind / "out", reference(paths, torch.float32))
        loaded = load(kind / "out")
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_checkpoints_of_apex_in_the_middle_of_a_stage(tmp_path):
    apex = APEX(stages=["2ba", "2ba"], threshold=0.25)
    _, weights, _ = run(apex, max_duration="4ba", save_folder=str(tmp_path), save_interval="1ba")
    merge([tmp_path / "ep0-ba4-rank0.pt"], tmp_path / "one")
    assert_loads_equal(tmp_path / "one", weights)
    paths = [tmp_path / f"ep0-ba{batch}-rank0.pt" for batch in (1, 3, 4)]
    merge(paths, tmp_path / "out")
    assert_loads_equal(tmp_path / "out", reference(paths, torch.float32))


def test_runs_of_several_names_are_told(checkpoints, base, tmp_path):
    branch = save(wrapped(load(base), tokenizer_of(base)), tmp_path / "b.pt", run="branch")
    notes = merge([checkpoints[1], branch], tmp_path / "out", base=str(base))
    (note,) = notes
    assert "several runs: branch, run" in note


def test_an_existing_folder_is_replaced_only_on_request(checkpoints, tmp_path):
    out = tmp_path / "out"
    merge(checkpoints[:1], out)
    (out / "old").touch()
    with pytest.raises(ValueError, match="out exists: give another --out, or --overwrite"):
        merge(checkpoints, out)
    merge(checkpoints, out, overwrite=True)
    assert not (out / "old").exists()
    assert_loads_equal(out, reference(checkpoints, torch.float32))
    inside = checkpoints[0].rename(out / "0.pt")
    for given, base in (([inside], None), (checkpoints[1:], str(out))):
        with pytest.raises(ValueError, match="--overwrite would delete .*which is read"):
            merge(given, out, base=base, overwrite=True)
    assert inside.exists()
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match="no folder of a model"):
        merge(checkpoints, tmp_path / "else", overwrite=True)


def test_nothing_is_left_of_what_fails(checkpoints, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(checkpoints[:1], out)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="the disk is full while writing .*out: nothing is left"):
        merge(checkpoints, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_loads_equal(out, weights_of(checkpoints[0]))


def test_a_disk_without_room_is_found_before(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=r"--out: the model needs 90.\d kB, free are 1.0 kB"):
        merge(checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()
