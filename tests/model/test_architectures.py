"""Every known architecture: what its sites are called, and rows that are what they are called."""

import pytest
import torch
from helpers import VOCABULARY, tiny_llama, tiny_qwen, tokens
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MptConfig, MptForCausalLM
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from apex_composer.model.sites import Group, Site, find_sites

LLAMA_LAYER = [
    ("self_attn.q_proj.weight", 0, "self_attn.heads"),
    ("self_attn.k_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.v_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.o_proj.weight", 1, "self_attn.heads"),
    ("mlp.gate_proj.weight", 0, "mlp.channels"),
    ("mlp.up_proj.weight", 0, "mlp.channels"),
    ("mlp.down_proj.weight", 1, "mlp.channels"),
]
SEPARATE = [
    ("attn.Wq.weight", 0, "attn.heads"),
    ("attn.Wk.weight", 0, "attn.kv_heads"),
    ("attn.Wv.weight", 0, "attn.kv_heads"),
]
FUSED = [
    ("attn.Wqkv.weight[queries]", 0, "attn.heads"),
    ("attn.Wqkv.weight[keys]", 0, "attn.kv_heads"),
    ("attn.Wqkv.weight[values]", 0, "attn.kv_heads"),
]
OUT_PROJ = ("attn.out_proj.weight", 1, "attn.heads")
GATE = ("ffn.gate_proj.weight", 0, "ffn.channels")
UP = ("ffn.up_proj.weight", 0, "ffn.channels")
DOWN = ("ffn.down_proj.weight", 1, "ffn.channels")


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


@pytest.fixture(scope="module")
def make_mpt():
    """A tiny llm-foundry MPT with the given attention and FFN settings."""
    from llmfoundry.models.mpt.configuration_mpt import MPTConfig
    from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

    def make(attention: dict, ffn: str = "mptmlp", bias: bool = True):
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
        )
        model = MPTForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
        return model

    return make


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


def laid_out(sites: list[Site]) -> list[tuple]:
    return [(site.name, site.axis, site.group.name) for site in sites]


def in_layers(prefix: str, layer: list[tuple], layers: int = 2) -> list[tuple]:
    return [
        (f"{prefix}.{i}.{name}", axis, f"{prefix}.{i}.{group}")
        for i in range(layers)
        for name, axis, group in layer
    ]


def check_weights(model: nn.Module, sites: list[Site]) -> None:
    """A site's name is its weight's name, and its units fill the axis from its offset on."""
    parameters = dict(model.named_parameters())
    for site in sites:
        name = site.name.split("[")[0]
        assert site.weight is parameters[name]
        bias = parameters.get(name.removesuffix("weight") + "bias")
        expected = [site.weight, bias] if bias is not None and site.axis == 0 else [site.weight]
        assert len(site.parameters()) == len(expected)
        assert all(a is b for a, b in zip(site.parameters(), expected, strict=True))
        length = site.weight.shape[site.axis]
        if name == site.name:
            assert (site.offset, site.group.units * site.group.unit_size) == (0, length)
        else:
            assert site.offset + site.group.units * site.group.unit_size <= length


def inputs_of_probes(model: nn.Module, groups: list[Group]) -> dict[str, torch.Tensor]:
    """What every group's probe reads in one forward pass, [samples, tokens, units, unit_size]."""
    seen, handles = {}, []
    for group in groups:
        read = lambda _, inputs, group=group: seen.update({group.name: inputs[0].detach()})  # noqa: E731
        handles.append(group.probe.register_forward_pre_hook(read))
    with torch.no_grad():
        model.eval()(input_ids=tokens(2))
    for handle in handles:
        handle.remove()
    return {g.name: seen[g.name].unflatten(-1, (-1, g.unit_size)) for g in groups}


def check_units(model: nn.Module, sites: list[Site]) -> None:
    """Changing one unit's rows changes that unit's activation in its layer and no other unit's.

    For a KV head: of the query heads that share it. For columns: zeroing a unit's columns is the
    same as zeroing its activation.
    """
    for site in sites:
        group, heads = site.group, site.group.assessed_by or site.group
        for unit in (0, group.units - 1):
            before = inputs_of_probes(model, [heads])[heads.name]
            indices = site.indices(torch.tensor([unit]))
            with torch.no_grad():
                saved = [p.clone() for p in site.parameters()]
                if site.axis == 1:
                    activation = torch.randn(3, heads.units, heads.unit_size)
                    removed = activation.clone()
                    removed[:, unit] = 0
                    expected = site.module(removed.flatten(1))
                    site.weight[:, indices] = 0
                    torch.testing.assert_close(site.module(activation.flatten(1)), expected)
                else:
                    for parameter in site.parameters():
                        parameter[indices] += 1.5 + torch.rand_like(parameter[indices])
                    after = inputs_of_probes(model, [heads])[heads.name]
                    changed = (after != before).flatten(0, 1).any(-1).any(0).nonzero().flatten()
                    shared = heads.units // group.units
                    expected = list(range(unit * shared, (unit + 1) * shared))
                    assert changed.tolist() == expected, (site.name, unit)
                for parameter, value in zip(site.parameters(), saved, strict=True):
                    parameter.copy_(value)


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


@pytest.mark.parametrize("variant", MPT_VARIANTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_mpt_of_llmfoundry(make_mpt, variant, bias):
    attention, ffn, layer = MPT_VARIANTS[variant]
    model = make_mpt(attention, ffn, bias)
    sites = find_sites(model)
    assert laid_out(sites) == in_layers("transformer.blocks", layer)
    check_weights(model, sites)
    check_units(model, sites)


@pytest.mark.parametrize(("attention", "kv_heads"), [({}, 4), (GROUPED, 2)])
def test_the_parts_of_a_fused_projection(make_mpt, attention, kv_heads):
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
