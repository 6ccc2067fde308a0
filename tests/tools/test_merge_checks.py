"""Checkpoints that have no mean are refused, before anything is written."""

from pathlib import Path

import pytest
import torch
from saved_runs import base_folder, load, noisy, save, save_run, wrapped
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from apex_composer.tools.merge import merge

PADDING = {
    "strategy": "BatchLongest",
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 63,
    "pad_type_id": 0,
    "pad_token": "<eos>",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def two(base, tmp_path) -> list[Path]:
    return save_run(base, tmp_path, 2)


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=False)["state"]


def change(path: Path, function) -> None:
    state = state_of(path)
    function(state)
    torch.save({"state": state}, path)


EMBEDDING = "model.model.embed_tokens.weight"
NORM = "model.model.norm.weight"


def settings(state: dict, part: str = "model", file: str = "config") -> dict:
    return state["integrations"]["huggingface"][part][file]["content"]


def shorter(state):
    state["model"][NORM] = state["model"][NORM][:-1]


DIFFERENT = {
    "names": (
        lambda state: state["model"].pop(NORM),
        "one of them has model.norm.weight and the other has not",
    ),
    "shapes": (shorter, r"model.norm.weight differs: torch.float32 \[3\d\], and .*\[3\d\]"),
    "dtypes": (
        lambda state: state["model"].update({NORM: state["model"][NORM].bfloat16()}),
        r"model.norm.weight differs: torch.\w+ \[32\], and torch.\w+ \[32\]",
    ),
    "configurations": (
        lambda state: settings(state).update(rope_theta=5e5),
        "config differs in rope_theta",
    ),
    "tokenizers": (
        lambda state: settings(state, "tokenizer", "tokenizer.json")["model"].update(unk_token="w"),
        "tokenizer.json differs in model",
    ),
    "no tokenizer": (
        lambda state: state["integrations"]["huggingface"].update(tokenizer={}),
        "special_tokens_map.json differs in eos_token, pad_token",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("order", [1, -1])
def test_different_models_are_refused(two, tmp_path, what, order):
    function, told = DIFFERENT[what]
    change(two[1], function)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"ba\d.pt and .*ba\d.pt cannot be averaged, .*{told}"):
        merge(two[::order], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_changes_within_a_run_is_no_difference(two, tmp_path):
    def later(state):
        settings(state).update(transformers_version="4.50.0", _attn_implementation_autoset=False)
        settings(state, "tokenizer", "tokenizer.json").update(padding=PADDING)

    change(two[1], later)
    merge(two, tmp_path / "out")


def test_the_same_checkpoint_twice_is_refused(two, tmp_path):
    link = tmp_path / "latest.pt"
    link.symlink_to(two[0].name)
    with pytest.raises(ValueError, match="ba0.pt and .*latest.pt are the same checkpoint"):
        merge([*two, link], tmp_path / "out")
    link.unlink()
    link.write_bytes(two[0].read_bytes())
    with pytest.raises(ValueError, match="latest.pt are both batch 0 of run 'run': give one"):
        merge([*two, link], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        merge([*two, tmp_path / "none.pt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda state: state["model"].pop(NORM), "has no model.norm.weight: its config"),
        (
            lambda state: state["model"].update({"model.extra": torch.ones(1)}),
            "has extra, which is not a part of the model",
        ),
        (shorter, r"model.norm.weight is \[31\], its configuration builds \[32\]"),
    ],
)
def test_weights_that_the_configuration_does_not_build_are_refused(two, tmp_path, function, told):
    change(two[0], function)
    with pytest.raises(ValueError, match=f"ba0.pt.* {told}"):
        merge(two[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_that_differ_are_refused(two, tmp_path):
    change(two[0], lambda state: settings(state).update(tie_word_embeddings=True))
    with pytest.raises(ValueError, match="embed_tokens.weight and lm_head.weight are one weight"):
        merge(two[:1], tmp_path / "out")
    change(two[0], lambda state: state["model"].pop("model.lm_head.weight"))
    merge(two[:1], tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, state_of(two[0])["model"][EMBEDDING])
    change(two[0], lambda state: state["model"].pop(EMBEDDING))
    with pytest.raises(ValueError, match=r"has no model\.embed_tokens\.weight: its config"):
        merge(two[:1], tmp_path / "none")


def test_buffers_have_no_mean(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    sizes |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    sizes |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 2}
    sizes |= {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=64, qk_nope_head_dim=4, **sizes))
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert name in dict(model.named_buffers())
    first = save(wrapped(noisy(model, 0)), tmp_path / "a.pt", batch=0)
    same = save(wrapped(noisy(model, 1)), tmp_path / "b.pt", batch=1)
    merge([first, same], tmp_path / "out")
    dict(model.named_buffers())[name].fill_(0.1)
    other = save(wrapped(model), tmp_path / "c.pt", batch=2)
    with pytest.raises(ValueError, match=f"b.pt and .*c.pt differ in {name}, of which no mean"):
        merge([same, other], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    merge([other], tmp_path / "one")  # its bits, not those of a mean through float64
    assert load(tmp_path / "one").state_dict()[name].tolist() == [float(torch.tensor(0.1))] * 2
