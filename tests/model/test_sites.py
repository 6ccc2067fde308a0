"""Sites of every known architecture: names, axes, units, and rows that are what they are called."""

import dataclasses

import pytest
import torch
from helpers import VOCABULARY, linear_site, tiny_llama, tiny_qwen, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from apex_composer.model.sites import (
    Group,
    Site,
    check_expandable,
    check_sites,
    clean_name,
    find_sites,
)

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


def test_groups_are_shared_by_the_sites_of_a_module():
    sites = find_sites(tiny_llama(kv_heads=2))[:7]
    queries, keys, values, output, gate, up, down = sites
    assert queries.group is output.group and keys.group is values.group
    assert gate.group is up.group is down.group
    assert keys.group.assessed_by is queries.group and queries.group.assessed_by is None
    assert queries.group.probe is output.module and down.group.probe is down.module


@pytest.mark.parametrize(
    ("unit_size", "offset", "expected"),
    [(1, 0, [3, 0]), (1, 5, [8, 5]), (2, 0, [6, 7, 0, 1]), (2, 5, [11, 12, 5, 6])],
)
def test_indices_of_units(unit_size, offset, expected):
    group = Group("g", "head", 4, unit_size, nn.Identity())
    indices = Site("w", nn.Linear(1, 20), 0, group, offset).indices(torch.tensor([3, 0]))
    assert indices.dtype == torch.int64 and indices.tolist() == expected


def test_the_weight_is_looked_up_when_asked_for():
    site = find_sites(tiny_llama())[0]
    replaced = nn.Parameter(torch.zeros_like(site.weight))
    site.module.weight = replaced
    assert site.weight is replaced and site.parameters()[0] is replaced


def test_an_unknown_architecture_is_told_what_was_seen_and_what_is_known():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError) as error:
        find_sites(model)
    message = str(error.value)
    assert "no sites to expand in GPT2LMHeadModel (model_type 'gpt2')" in message
    seen, known = message.split("Module names seen: ")[1].split("Known architectures: ")
    assert {"attn", "c_attn", "c_proj", "mlp"} <= set(seen.rstrip(". ").split(", "))
    assert known.startswith("llama, mistral, mpt, qwen2. ")


def test_a_known_architecture_without_its_modules_is_refused():
    class Hollow(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny_llama().config
            self.body = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"Hollow \(model_type 'llama'\).*names seen: body\. "):
        find_sites(Hollow())


def test_a_plain_module_is_refused():
    with pytest.raises(ValueError, match=r"Linear \(model_type None\).*names seen: none\. "):
        find_sites(nn.Linear(2, 2))


def wrap_children(model, kind: type, wrapper):
    """Replace every module of a class by its wrapped self."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == kind:
                setattr(module, name, wrapper(child))
    return model


WRAPPINGS = {
    "DDP": nn.DataParallel,  # the same `module.` as DistributedDataParallel, without processes
    "compiled": torch.compile,
    "compiled DDP": lambda model: torch.compile(nn.DataParallel(model)),
    "checkpointed layers": lambda m: wrap_children(m, "LlamaDecoderLayer", checkpoint_wrapper),
    "compiled layers": lambda m: wrap_children(m, "LlamaDecoderLayer", torch.compile),
    "checkpointed attention": lambda m: wrap_children(m, "LlamaAttention", checkpoint_wrapper),
    "compiled ffn": lambda m: wrap_children(m, "LlamaMLP", torch.compile),
}


@pytest.mark.parametrize(
    "wrapping",
    [w for w in WRAPPINGS],
)
def test_names_do_without_what_wrappers_put_in(wrapping):
    sites = find_sites(WRAPPINGS[wrapping](tiny_llama()))
    assert laid_out(sites) == in_layers("model.layers", LLAMA_LAYER)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("module.model.layers.0.mlp", "model.layers.0.mlp"),
        ("_fsdp_wrapped_module.model._fsdp_wrapped_module.layers.0", "model.layers.0"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("_orig_mod.module.model", "model"),
        ("model.module.layers", "model.module.layers"),  # not a wrapper's: inside the name
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_weights_are_expandable(dtype):
    for site in find_sites(tiny_llama(dtype=dtype)):
        check_expandable(site)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_weights_are_refused(dtype):
    site = find_sites(tiny_llama().to(dtype))[3]
    with pytest.raises(ValueError, match="master_weights_dtype: fp32") as error:
        check_expandable(site)
    assert f"model.layers.0.self_attn.o_proj.weight is held in {dtype}" in str(error.value)


def test_a_tied_weight_is_refused():
    """Two operators would fold into each other's rows; the parts of a fused one do not meet."""
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    told = r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\.mlp\.up_proj\.weight are one tied"
    with pytest.raises(ValueError, match=told):
        check_sites(find_sites(model))
    second.up_proj.weight = torch.nn.Parameter(first.up_proj.weight.detach().clone())
    check_sites(find_sites(model))


def biased_sites() -> tuple[Site, Site]:
    return tuple(linear_site(8, 6, bias=True, name=name) for name in ("first", "second"))


def test_a_tied_bias_is_refused():
    first, second = biased_sites()
    check_sites([first, second])
    second.module.bias = first.module.bias
    with pytest.raises(ValueError, match="first and second are one tied bias"):
        check_sites([first, second])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_two_parameters_in_one_memory_are_refused(name):
    first, second = biased_sites()
    setattr(second.module, name, torch.nn.Parameter(getattr(first.module, name).data))
    with pytest.raises(ValueError, match=f"first and second are one tied {name}"):
        check_sites([first, second])


def test_empty_parameters_are_not_taken_for_tied_ones():
    """A rank of FSDP may hold nothing of a weight; so do all on the meta device."""
    for change in (lambda p: p.data[:0], lambda p: p.data.to("meta")):
        first, second = biased_sites()
        for site in (first, second):
            for name in ("weight", "bias"):
                parameter = torch.nn.Parameter(change(getattr(site.module, name)))
                setattr(site.module, name, parameter)
        check_sites([first, second])


def test_parts_of_a_fused_projection_share_weight_and_bias():
    queries = linear_site(12, 6, bias=True, name="queries")
    group = dataclasses.replace(queries.group, units=4)
    parts = [dataclasses.replace(queries, group=group, offset=4 * i, name=f"{i}") for i in range(3)]
    check_sites(parts)
    with pytest.raises(ValueError, match="0 and 3 are one tied weight"):
        check_sites([*parts, dataclasses.replace(parts[1], offset=3, name="3")])
