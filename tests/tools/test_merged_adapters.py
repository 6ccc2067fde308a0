"""Checkpoints with adapters become models without, which compute the same."""

from pathlib import Path

import pytest
import torch
from helpers import exact_norms
from peft import LoraConfig
from saved_runs import assert_loads_equal, base_folder, load, noisy, save, save_sharded, wrapped

from apex_composer.tools.merge import merge

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# float64 rounds to 1.1e-16; a logit passes 30 products of at most 64 terms: 64 x 30 x 1.1e-16 =
# 2e-13 if all errors had one sign. In float32 (1.2e-7 / 2) the same is 1.1e-4.
FLOAT64, FLOAT32 = 1e-12, 2e-4
KINDS = {
    "lora": ({}, FLOAT64),
    "rslora": ({"use_rslora": True, "r": 4}, FLOAT64),
    "dora": ({"use_dora": True}, FLOAT64),
    "ranks": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}, FLOAT64),
    "beside": ({"modules_to_save": ["lm_head", "norm"]}, FLOAT64),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, FLOAT64),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, FLOAT64),
    "pissa": ({"init_lora_weights": "pissa"}, FLOAT32),  # peft computes it in float32 only
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


def trained(base: Path, seed: int = 0, *, dtype=torch.float64, only: bool = False, **settings):
    """A model with adapters, of which the trained weights have left their start."""
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": EVERYWHERE, **settings}
    model = exact_norms(load(base).to(dtype))
    whole = wrapped(model, peft_config=LoraConfig(**lora), should_save_peft_only=only)
    noisy(whole.model, seed)
    return whole


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_trained_one_computes(base, tmp_path, kind):
    settings, bound = KINDS[kind]
    dtype = torch.float64 if bound == FLOAT64 else torch.float32
    model = trained(base, dtype=dtype, **settings)
    path = save(model, tmp_path / "ba1.pt")
    merge([path], tmp_path / "out")
    merged = exact_norms(load(tmp_path / "out"))
    assert merged.dtype == dtype
    start = exact_norms(load(base).to(dtype))
    assert difference(logits(merged), logits(model.model)) < bound
    assert difference(logits(start), logits(model.model)) > 0.1
    assert_loads_equal(tmp_path / "out", model.model.merge_and_unload().state_dict())


def test_the_mean_is_that_of_products(base, tmp_path):
    models = [trained(base, seed) for seed in range(2)]
    paths = [save(m, tmp_path / f"{n}.pt", batch=n) for n, m in enumerate(models)]
    paths[1] = save_sharded(paths[1], tmp_path / "sharded")
    merge(paths, tmp_path / "out")
    layers = [m.model.base_model.model.model.layers[0].self_attn.q_proj for m in models]
    factors = [(one.lora_A["default"].weight, one.lora_B["default"].weight) for one in layers]
    (start,) = {one.base_layer.weight for one in layers[:1]}
    (a1, b1), (a2, b2) = factors
    scale = 8 / 2  # lora_alpha / r
    name = "model.layers.0.self_attn.q_proj.weight"
    found = load(tmp_path / "out").state_dict()[name]
    products = start + scale * (b1 @ a1 + b2 @ a2) / 2
    assert difference(found, products.detach()) < FLOAT64
    of_factors = start + scale * (b1 + b2) @ (a1 + a2) / 4
    assert difference(found, of_factors.detach()) > 1e-3
    wholes = [m.model.merge_and_unload().state_dict() for m in models]
    means = {name: (one + wholes[1][name]) / 2 for name, one in wholes[0].items()}
    assert_loads_equal(tmp_path / "out", means)


@pytest.mark.parametrize("given", ["named by the checkpoint", "given"])
def test_adapters_alone_are_merged_into_their_base(base, tmp_path, given):
    models = [trained(base, seed, only=True, dtype=torch.float32) for seed in range(2)]
    if given == "given":
        for model in models:
            model.model.peft_config["default"].base_model_name_or_path = "moved/away"
    paths = [save(m, tmp_path / f"{n}.pt", batch=n) for n, m in enumerate(models)]
    notes = merge(paths, tmp_path / "out", base=str(base) if given == "given" else None)
    assert not any("generation" in note for note in notes)
    assert load(tmp_path / "out").generation_config.temperature == 0.5
    wholes = [m.model.merge_and_unload().state_dict() for m in models]
    means = {name: ((w.double() + wholes[1][name]) / 2).float() for name, w in wholes[0].items()}
    assert_loads_equal(tmp_path / "out", means)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' had changed the base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.* with `model.should_save_peft_only"),
        ({}, "their base 'moved/away' is not on this machine .*--base"),
    ],
)
def test_adapters_without_what_they_need_are_refused(base, tmp_path, settings, told):
    model = trained(base, only=True, dtype=torch.float32, **settings)
    if not settings:
        model.model.peft_config["default"].base_model_name_or_path = "moved/away"
    with pytest.raises(ValueError, match=told):
        merge([save(model, tmp_path / "a.pt")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_kinds_are_refused(base, tmp_path):
    models = [trained(base), trained(base, use_rslora=True)]
    paths = [save(m, tmp_path / f"{n}.pt", batch=n) for n, m in enumerate(models)]
    with pytest.raises(ValueError, match="peft_config differs in use_rslora"):
        merge(paths, tmp_path / "out")
