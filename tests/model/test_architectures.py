"""Every known architecture: what its sites are called, and rows that are what they are called."""

import pytest
from architecture_checks import (
    DOWN,
    FUSED,
    OUT_PROJ,
    UP,
    check_units,
    check_weights,
    in_layers,
    laid_out,
)
from helpers import VOCABULARY, tiny_llama, tiny_qwen
from transformers import MistralConfig, MistralForCausalLM, MptConfig, MptForCausalLM
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from apex_composer.model.sites import find_sites

LLAMA_LAYER = [
    ("self_attn.q_proj.weight", 0, "self_attn.heads"),
    ("self_attn.k_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.v_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.o_proj.weight", 1, "self_attn.heads"),
    ("mlp.gate_proj.weight", 0, "mlp.channels"),
    ("mlp.up_proj.weight", 0, "mlp.channels"),
    ("mlp.down_proj.weight", 1, "mlp.channels"),
]


def tiny_mistral():
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # not hidden_size / heads, as in Mistral-Nemo
        max_position_embeddings=64,
    )
    return MistralForCausalLM(config)


def tiny_hf_mpt():
    config = MptConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=4,
        n_layers=2,
        expansion_ratio=1,
        max_seq_len=64,
        attn_config=MptAttentionConfig(),
    )
    return MptForCausalLM(config)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama(kv_heads):
    model = tiny_llama(kv_heads=kv_heads)
    sites = find_sites(model)
    assert laid_out(sites) == in_layers("model.layers", LLAMA_LAYER)
    units = {s.group.unit: (s.group.units, s.group.unit_size) for s in sites}
    assert units == {"head": (4, 8), "kv_head": (kv_heads, 8), "channel": (24, 1)}
    check_weights(model, sites)
    check_units(model, sites)


def test_mistral_with_a_head_size_of_its_own():
    model = tiny_mistral()
    sites = find_sites(model)
    assert laid_out(sites) == in_layers("model.layers", LLAMA_LAYER)
    units = {s.group.unit: (s.group.units, s.group.unit_size) for s in sites}
    assert units == {"head": (4, 16), "kv_head": (2, 16), "channel": (24, 1)}
    check_weights(model, sites)
    check_units(model, sites)


def test_qwen2_with_biases():
    model = tiny_qwen()
    sites = find_sites(model)
    assert laid_out(sites) == in_layers("model.layers", LLAMA_LAYER)
    with_bias = [s.name.split(".")[-2] for s in sites if len(s.parameters()) == 2]
    assert with_bias == ["q_proj", "k_proj", "v_proj"] * 2
    check_weights(model, sites)
    check_units(model, sites)


def test_mpt_of_transformers():
    model = tiny_hf_mpt()
    sites = find_sites(model)
    layer = [*FUSED, OUT_PROJ, UP, DOWN]
    assert laid_out(sites) == in_layers("transformer.blocks", layer)
    check_weights(model, sites)
    check_units(model, sites)
