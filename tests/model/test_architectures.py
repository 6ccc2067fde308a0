"""Every known architecture: what its sites are called, and weights that are what they are called.

QK-norm, soft-capping, sliding windows and norms behind attention or FFN lie between or behind the
projections, and need nothing: the models that have them are held to the same as the others.
"""

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
    inputs_of_probes,
    laid_out,
)
from helpers import tiny_llama
from tiny_models import CONFIGURATIONS, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from apex_composer.model.architectures import ARCHITECTURES, Architecture
from apex_composer.model.find_sites import find_sites

ATTENTION = [
    ("self_attn.q_proj.weight", 0, "self_attn.heads"),
    ("self_attn.k_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.v_proj.weight", 0, "self_attn.kv_heads"),
    ("self_attn.o_proj.weight", 1, "self_attn.heads"),
]
GATED = [
    ("mlp.gate_proj.weight", 0, "mlp.channels"),
    ("mlp.up_proj.weight", 0, "mlp.channels"),
    ("mlp.down_proj.weight", 1, "mlp.channels"),
]
LLAMA = ("model.layers", [*ATTENTION, *GATED])
LAYERS = {
    "mpt": ("transformer.blocks", [*FUSED, OUT_PROJ, UP, DOWN]),
    "starcoder2": (
        "model.layers",
        [*ATTENTION, ("mlp.c_fc.weight", 0, "mlp.channels")]
        + [("mlp.c_proj.weight", 1, "mlp.channels")],
    ),
    "phi3": (
        "model.layers",
        [
            ("self_attn.qkv_proj.weight[queries]", 0, "self_attn.heads"),
            ("self_attn.qkv_proj.weight[keys]", 0, "self_attn.kv_heads"),
            ("self_attn.qkv_proj.weight[values]", 0, "self_attn.kv_heads"),
            ("self_attn.o_proj.weight", 1, "self_attn.heads"),
            ("mlp.gate_up_proj.weight[gate]", 0, "mlp.channels"),
            ("mlp.gate_up_proj.weight[up]", 0, "mlp.channels"),
            ("mlp.down_proj.weight", 1, "mlp.channels"),
        ],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            ("attention.query_key_value.weight[queries]", 0, "attention.heads"),
            ("attention.query_key_value.weight[keys]", 0, "attention.kv_heads"),
            ("attention.query_key_value.weight[values]", 0, "attention.kv_heads"),
            ("attention.dense.weight", 1, "attention.heads"),
            ("mlp.dense_h_to_4h.weight", 0, "mlp.channels"),
            ("mlp.dense_4h_to_h.weight", 1, "mlp.channels"),
        ],
    ),
    "gpt2": (  # transposed
        "transformer.h",
        [
            ("attn.c_attn.weight[queries]", 1, "attn.heads"),
            ("attn.c_attn.weight[keys]", 1, "attn.kv_heads"),
            ("attn.c_attn.weight[values]", 1, "attn.kv_heads"),
            ("attn.c_proj.weight", 0, "attn.heads"),
            ("mlp.c_fc.weight", 1, "mlp.channels"),
            ("mlp.c_proj.weight", 0, "mlp.channels"),
        ],
    ),
}
FULL_ATTENTION = {"mpt", "gpt_neox", "gpt2"}  # as many KV heads as heads
BIASES = {
    "qwen2": {"q_proj", "k_proj", "v_proj"},
    "granite": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},
    "gpt2": {"c_attn", "c_fc"},
}


def test_every_architecture_of_the_table_is_tested():
    assert set(CONFIGURATIONS) == set(ARCHITECTURES)


def without_norms_over_heads(model: nn.Module) -> nn.Module:
    """OLMo-2's QK-norms: each head's queries and keys depend on those of all heads."""
    for module in model.modules():
        if type(module).__name__ == "Olmo2Attention":
            module.q_norm = module.k_norm = nn.Identity()
    return model


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_sites_are_what_they_are_called(model_type):
    model = without_norms_over_heads(tiny_model(model_type))
    sites = find_sites(model)
    prefix, layer = LAYERS.get(model_type, LLAMA)
    if model_type == "gemma3":  # where transformers puts its language model depends on the version
        prefix = sites[0].name.split(".0.")[0]
    assert laid_out(sites) == in_layers(prefix, layer)
    size = sites[0].group.unit_size
    channels = 128 if model_type == "mpt" else 24  # always 4 * d_model
    assert {s.group.unit: (s.group.units, s.group.unit_size) for s in sites} == {
        "head": (4, size),
        "kv_head": (4 if model_type in FULL_ATTENTION else 2, size),
        "channel": (channels, 1),
    }
    assert size == CONFIGURATIONS[model_type].get("head_dim", size) and size in (8, 16)
    with_bias = {s.name.split(".")[-2] for s in sites if len(s.parameters()) == 2}
    assert with_bias == BIASES.get(model_type, set())
    check_weights(model, sites)
    check_units(model, sites)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_llama_with_full_attention_and_with_one_kv_head(kv_heads):
    model = tiny_llama(kv_heads=kv_heads)
    sites = find_sites(model)
    assert laid_out(sites) == in_layers(*LLAMA)
    assert sites[1].group.units == kv_heads
    check_weights(model, sites)
    check_units(model, sites)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_keys_are_told_from_queries(model_type):
    """What is added to all keys of a head alike changes no attention; with queries it does.

    Not so where keys are rotated by their place: the last entry of a head is not, in these two.
    """
    model = tiny_model(model_type, torch.float64)
    sites = {site.name.split("[")[-1]: site for site in find_sites(model)[:3]}
    heads = sites["queries]"].group
    before = inputs_of_probes(model, [heads])[heads.name]
    for part, changes in (("queries]", True), ("keys]", False)):
        last = sites[part].indices(torch.tensor([1]))[-1]
        with torch.no_grad():
            sites[part].module.bias[last] += 1
            after = inputs_of_probes(model, [heads])[heads.name]
            sites[part].module.bias[last] -= 1
        assert (float((after - before).abs().max()) > 1e-3) == changes


class Attention(nn.Module):
    """Queries, keys and values of 2 heads of 4 in projections of the given numbers of outputs."""

    head_dim = 4

    def __init__(self, **outputs: int):
        super().__init__()
        for name, number in outputs.items():
            setattr(self, name, nn.Linear(8, number))
        self.out = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("outputs", "by_head", "told"),
    [
        ({"q": 16, "k": 8, "v": 8}, False, r"q.weight has 16 outputs, and queries of \[2\] units"),
        ({"q": 8, "k": 8, "v": 4}, False, "v.weight has 4 outputs"),
        ({"q": 8, "k": 2, "v": 2}, False, r"k.weight has 2 outputs, and keys of \[0\] units"),
        ({"q": 8, "k": 12, "v": 12}, False, r"keys of \[3\] units"),  # not shared evenly
        ({"fused": 20}, False, "fused.weight has 20 outputs"),
        ({"fused": 8}, False, "would be 8|has 8 outputs"),
        ({"fused": 16}, True, r"\[2, 1, 1\] units"),  # head by head, but of unequal numbers
        ({"fused": 16, "q": 8}, False, "fused.weight, .*q.weight, .*out.weight: several hold q"),
    ],
)
def test_a_layout_that_the_table_does_not_describe_is_refused(monkeypatch, outputs, by_head, told):
    attention = {"fused": "queries keys values", "q": "queries", "k": "keys", "v": "values"}
    row = Architecture({**attention, "out": "output"}, {}, by_head=by_head)
    monkeypatch.setitem(ARCHITECTURES, "llama", row)
    model = Attention(**outputs)
    model.config = tiny_llama(layers=1).config
    with pytest.raises(ValueError, match=told):
        find_sites(model)


def test_an_architecture_of_ones_own(monkeypatch):
    """A row in the table is all that there is to do; its order does not matter."""
    row = Architecture({"out": "output", "v": "values", "q": "queries", "k": "keys"}, {})
    monkeypatch.setitem(ARCHITECTURES, "mine", row)
    model = Attention(q=8, k=4, v=4)
    model.config = type("Config", (), {"model_type": "mine"})
    found = {s.name: (s.axis, s.group.units) for s in find_sites(nn.Sequential(model))}
    assert found == {
        "0.out.weight": (1, 2),
        "0.v.weight": (0, 1),
        "0.q.weight": (0, 2),
        "0.k.weight": (0, 1),
    }


def test_cross_attention_is_not_taken_for_grouped_queries():
    """GPT-2's: keys and values alone in `c_attn`, as many as queries and half as many of both."""
    model = GPT2Model(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    model.h[0].crossattention = type(model.h[0].attn)(model.config, is_cross_attention=True)
    for targets in (["head"], None):
        with pytest.raises(ValueError, match="crossattention.*several hold queries: this model"):
            find_sites(model, targets)


def test_projections_of_an_unknown_kind_are_refused():
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.c_fc = nn.Linear(32, 24)  # in place of a Conv1D, as LoRA's
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc.weight: a Linear does not say .* nx and"):
        find_sites(model)


@pytest.mark.parametrize("targets", [None, ["head", "channel"]])
def test_layers_of_an_unknown_kind_are_not_left_out_in_silence(targets):
    model = tiny_llama(layers=3)
    model.model.layers[1].mlp = nn.Identity()  # a mixture of experts, say
    with pytest.raises(ValueError, match=r"3 attention and 2 FFN.*`targets: \[head\]`"):
        find_sites(model, targets)
    assert len(find_sites(model, ["head"])) == 12
    model.model.layers[1] = nn.Identity()  # nor attention
    with pytest.raises(ValueError, match=r"layers has 3 layers, of which \[1\] \(Identity\) have"):
        find_sites(model, targets)
    assert len(find_sites(model, ["channel"])) == 6


def test_a_model_of_unknown_ffns_only_is_expanded_by_choice():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match="2 attention and 0 FFN"):
        find_sites(model)
    assert len(find_sites(model, ["head"])) == 8
