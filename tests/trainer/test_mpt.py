"""llm-foundry's MPT: what its sites are called, and rows that are what they are called."""

from types import SimpleNamespace

import pytest
import torch
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
from both_ways import compare
from helpers import VOCABULARY
from llmfoundry.models.mpt import ComposerMPTCausalLM, MPTConfig, MPTForCausalLM
from torch import nn

from apex_composer.callbacks.flops_per_batch import read_plain
from apex_composer.model.find_sites import find_sites
from apex_composer.model.flops import training_flops
from apex_composer.model.trained_parts import find_roles

SEPARATE = [
    ("attn.Wq.weight", 0, "attn.heads"),
    ("attn.Wk.weight", 0, "attn.kv_heads"),
    ("attn.Wv.weight", 0, "attn.kv_heads"),
]
GATE = ("ffn.gate_proj.weight", 0, "ffn.channels")
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
MPT_VARIANTS = {
    "fused": ({}, "mptmlp", [*FUSED, OUT_PROJ, UP, DOWN]),
    "fused grouped": (GROUPED, "mptglu", [*FUSED, OUT_PROJ, GATE, UP, DOWN]),
    "separate": ({"fused_qkv": False}, "mptglu", [*SEPARATE, OUT_PROJ, GATE, UP, DOWN]),
    "separate grouped": (
        {"fused_qkv": False, **GROUPED},
        "mptmlp",
        [*SEPARATE, OUT_PROJ, UP, DOWN],
    ),
}
FLOPS_LENGTH = 8
FLOPS_VARIANTS = {
    "plain": ({}, "mptmlp"),
    "grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, "mptglu"),
    "multi-query": ({"attn_type": "multiquery_attention"}, "mptmlp"),
    "separate": ({"fused_qkv": False}, "mptglu"),
}


def make_mpt(attention: dict, ffn: str = "mptmlp", bias: bool = True, **options) -> MPTForCausalLM:
    """A tiny llm-foundry MPT with the given attention and FFN settings."""
    torch.manual_seed(0)
    config = MPTConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        no_bias=not bias,
        use_cache=False,
        attn_config={"attn_impl": "torch", **attention},
        ffn_config={"ffn_type": ffn, "ffn_hidden_size": 24},
        **options,
    )
    model = MPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("variant", MPT_VARIANTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_mpt_of_llmfoundry(variant, bias):
    attention, ffn, layer = MPT_VARIANTS[variant]
    model = make_mpt(attention, ffn, bias)
    sites = find_sites(model)
    assert laid_out(sites) == in_layers("transformer.blocks", layer)
    check_weights(model, sites)
    check_units(model, sites)


@pytest.mark.parametrize(("attention", "kv_heads"), [({}, 4), (GROUPED, 2)])
def test_the_parts_of_a_fused_projection(attention, kv_heads):
    """Changing the rows named queries, keys or values changes that output alone, in that head."""
    model = make_mpt(attention)
    module = model.transformer.blocks[0].attn
    sites = {s.name.split("[")[1].rstrip("]"): s for s in find_sites(model)[:3]}
    assert [s.offset for s in sites.values()] == [0, 32, 32 + kv_heads * 8]
    hidden = torch.randn(2, 3, 32)
    before = module.get_qkv(hidden)
    for place, part in enumerate(("queries", "keys", "values")):
        indices = sites[part].indices(torch.tensor([1]))
        with torch.no_grad():
            saved = module.Wqkv.weight.clone()
            module.Wqkv.weight[indices] += 1
            after = module.get_qkv(hidden)
            module.Wqkv.weight.copy_(saved)
        for other in range(3):
            changed = (after[other] != before[other]).flatten(0, 1).any(0).nonzero().flatten()
            assert changed.tolist() == (list(range(8, 16)) if other == place else [])


@pytest.mark.numeric
def test_fused_projection_with_biases_equals_autograd():
    """Three operators share the rows of one Wqkv weight and its bias."""
    attention = {"alibi": True, **GROUPED}
    stages = compare(make_mpt(attention, "mptglu", norm_type="layernorm").double())
    names = ["transformer.blocks.0.attn.Wqkv.weight", "transformer.blocks.0.attn.Wqkv.bias"]
    assert sum(operator["names"] == names for operator in stages[0]) == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", FLOPS_VARIANTS)
def test_llm_foundrys_mpt_counts_the_same_and_norms_biases_and_positions(variant, tied):
    attention, ffn = FLOPS_VARIANTS[variant]
    model = MPTForCausalLM(
        MPTConfig(
            **{"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
            attn_config={"attn_impl": "torch", **attention},
            ffn_config={"ffn_type": ffn, "ffn_hidden_size": 24},
            tie_word_embeddings=tied,
        )
    )
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.transformer.wte.weight.numel()
    more = parameters - sum(m.numel() for m in matrices) - embeddings
    own = SimpleNamespace(model=model, n_active_params=parameters)
    own.n_active_params -= 0 if tied else embeddings
    own.get_attention_flops = lambda s: ComposerMPTCausalLM.get_attention_flops(own, s)
    batch = {"input_ids": torch.zeros(2, FLOPS_LENGTH, dtype=torch.long)}
    theirs = ComposerMPTCausalLM.flops_per_batch(own, batch)
    assert theirs == training_flops(model.config)(batch) + 6 * more * 2 * FLOPS_LENGTH
    trained = {name for name, _ in model.named_parameters()}
    assert find_roles(model).flops(trained) == training_flops(model.config)
    assert more > 0


def test_llm_foundrys_mpt_keeps_its_own_count():
    assert callable(ComposerMPTCausalLM.flops_per_batch)
    model = SimpleNamespace(flops_per_batch=ComposerMPTCausalLM.flops_per_batch)
    assert read_plain(model) is None
