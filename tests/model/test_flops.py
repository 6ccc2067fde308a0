"""FLOPs by the formula are those that torch counts while small models train."""

import copy
import pickle

import pytest
import torch
from tiny_models import CONFIGURATIONS, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apex_composer.model.flops import forward_flops, read_shape, training_flops
from apex_composer.model.sites import clean_name
from apex_composer.model.trained_parts import find_roles

SEQUENCES, LENGTH = 2, 4  # as long as the windows of the models that have them


def counted(model: nn.Module, length: int = LENGTH, backward: bool = True) -> int:
    """What torch counts of forward and backward pass, but for the angles of rotary embeddings."""
    ids = torch.randint(0, 64, (SEQUENCES, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        if backward:
            logits.sum().backward()
    model.zero_grad()
    by_module = counter.get_flop_counts()
    angles = [name for name in by_module if name.split(".")[-1].startswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(by_module[name].values()) for name in angles)


def eager(model: nn.Module) -> nn.Module:
    """Attention as products that torch counts one by one; fused ones are counted another way."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    return model


def counted_by_formula(model: nn.Module) -> int:
    trained = {clean_name(n) for n, p in model.named_parameters() if p.requires_grad}
    return SEQUENCES * find_roles(model).flops(trained).of_sequence(LENGTH)


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_every_architecture(model_type):
    model = eager(tiny_model(model_type))
    batch = {"input_ids": torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)}
    found = training_flops(model.config)
    assert found(batch) == counted(model) == counted_by_formula(model)
    assert training_flops(model.config.to_dict()) == found
    with torch.no_grad():
        assert forward_flops(model.config)(batch) == counted(model, backward=False)
    assert found(batch) == 3 * forward_flops(model.config)(batch)


def some_trained(model: nn.Module, which: list[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in which))
    return model


@pytest.mark.parametrize(
    "which",
    [
        ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
        ["layers.0.self_attn.v_proj"],
        ["layers.0.self_attn.o_proj", "layers.1"],
        ["layers.0.mlp.down_proj"],
        ["layers.1.mlp.gate_proj", "lm_head"],
        ["layers.1", "norm"],
        ["layers.1.self_attn.k_proj.bias"],
        ["lm_head"],
        ["model.norm"],
        ["embed_tokens"],
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "granite"])
def test_what_is_frozen_has_no_gradients(model_type, which):
    model = some_trained(eager(tiny_model(model_type)), which)
    assert (
        counted_by_formula(model)
        == counted(model)
        < training_flops(model.config)({"input_ids": torch.zeros(SEQUENCES, LENGTH)})
    )


@pytest.mark.parametrize(
    ("model_type", "which"),
    [
        ("gpt_neox", ["layers.0.mlp.dense_4h_to_h", "layers.1.attention"]),
        ("gpt_neox", ["layers.0.attention.dense", "layers.1.mlp"]),
        ("gpt2", ["h.1.attn.c_attn"]),
        ("gpt2", ["wpe"]),
        ("gpt2", ["h.0.attn.c_proj", "wte"]),  # tied: the head too
        ("phi3", ["layers.0.mlp.gate_up_proj", "layers.1.self_attn.qkv_proj"]),
        ("mpt", ["blocks.0.ffn", "blocks.1.attn.Wqkv"]),
        ("gemma3", ["layers.1.self_attn"]),
        ("qwen3", ["layers.0.self_attn.q_norm"]),
        ("gemma2", ["layers.0.self_attn.o_proj"]),
    ],
)
def test_what_is_frozen_in_other_layouts(model_type, which):
    model = some_trained(eager(tiny_model(model_type)), which)
    assert counted_by_formula(model) == counted(model)


def test_a_norm_behind_the_projections_is_taken_for_one_before_them():
    model = some_trained(eager(tiny_model("olmo2")), ["layers.1.post_attention_layernorm"])
    shape = read_shape(model.config)
    more = counted_by_formula(model) - counted(model)
    inputs = 2 * shape.width * sum(shape.attention.values())  # and attention's own gradients:
    pairs = 8 * LENGTH * shape.attention["queries"] + 2 * shape.width**2
    assert more == SEQUENCES * LENGTH * (inputs + pairs)


def test_a_window_counts_the_keys_that_are_seen():
    model = eager(tiny_model("gemma2"))
    shape, length = read_shape(model.config), 3 * LENGTH
    assert shape.windows == (LENGTH, None)
    found = SEQUENCES * training_flops(model.config).of_sequence(length)
    hidden = 12 * shape.attention["queries"] * length * (length - LENGTH)
    assert found + SEQUENCES * hidden == counted(model, length)


@pytest.mark.parametrize(
    ("model_type", "settings", "windows"),
    [
        ("mistral", {"sliding_window": 8}, (8, 8)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {"sliding_window": 8}, (None, None)),
        (
            "qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (None, 8),
        ),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None)),
        (
            "llama",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            (None, 8),
        ),
    ],
)
def test_which_layers_have_windows(model_type, settings, windows):
    config = {**CONFIGURATIONS[model_type], "model_type": model_type, **settings}
    assert read_shape(config).windows == windows


def test_tinyllama_by_hand():
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
    found = training_flops({"model_type": "llama", **sizes, **heads})
    weights = 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 2048 * 32000
    assert weights == 1_100_048_384 - 2048 * 32000 - 45 * 2048  # without embeddings and norms
    assert found.per_token == 6 * weights
    assert found.of_sequence(4096) == 6 * weights * 4096 + 12 * 22 * 2048 * 4096**2


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not known, known are: gemma, gemma2"),
        ({}, "model_type None"),
        (
            {"model_type": "mpt", "d_model": 8, "n_heads": 1, "n_layers": 1}
            | {"ffn_config": {"ffn_type": "mb_moe", "ffn_hidden_size": 8}, "attn_config": {}},
            "ffn_type 'mb_moe'",
        ),
    ],
)
def test_an_unknown_architecture_has_no_number(config, told):
    with pytest.raises(ValueError, match=told):
        training_flops(config)


def test_a_model_that_is_not_its_configuration_has_no_number():
    model = tiny_model("llama")
    model.config.intermediate_size = 32
    with pytest.raises(ValueError, match=r"matrices of [\d,]+ numbers .* its configuration tells"):
        find_roles(model)
    model = tiny_model("llama")
    model.model.layers[1].mlp.router = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"layers.1.mlp.router.weight \[4, 32\] is no matrix that"):
        find_roles(model)


def test_the_count_is_plain_numbers():
    found = training_flops({**CONFIGURATIONS["gpt2"], "model_type": "gpt2"})
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found
