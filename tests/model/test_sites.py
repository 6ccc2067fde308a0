"""Sites and groups: their indices and names, and the models that have none to expand."""

import dataclasses
import re

import pytest
import torch
from helpers import linear_site, tiny_llama
from tiny_models import CONFIGURATIONS, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from apex_composer.model.architectures import ARCHITECTURES, Architecture
from apex_composer.model.find_sites import find_sites
from apex_composer.model.sites import Group, Site, check_sites, clean_name, projection_of


def test_groups_are_shared_by_the_sites_of_a_module():
    sites = find_sites(tiny_llama(kv_heads=2))[:7]
    queries, keys, values, output, gate, up, down = sites
    assert queries.group is output.group and keys.group is values.group
    assert gate.group is up.group is down.group
    assert keys.group.assessed_by is queries.group and queries.group.assessed_by is None
    assert queries.group.probe is output.module and down.group.probe is down.module


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_no_two_projections_of_a_layer_have_one_name(model_type):
    """Of GPT-2's two c_proj, means over the layers would be of both."""
    sites = find_sites(tiny_model(model_type))
    layers = [(re.findall(r"\.\d+\.", site.name), projection_of(site.name)) for site in sites]
    assert all(layers.count(own) == 1 for own in layers)


def test_projections_have_the_names_of_their_weights():
    names = {
        "layers.3.self_attn.q_proj.weight": "q_proj", "attn.Wqkv.weight[keys]": "Wqkv[keys]",
        "layers.3.self_attn.q_proj.bias": "q_proj.bias", "h.0.attn.c_proj.weight": "attn.c_proj",
        "h.0.mlp.c_proj.bias": "mlp.c_proj.bias", "lm_head.weight": "lm_head",
    }  # fmt: skip
    assert {name: projection_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("unit_size", "offset", "stride", "expected"),
    [
        (1, 0, None, [3, 0]),
        (1, 5, None, [8, 5]),
        (2, 0, None, [6, 7, 0, 1]),
        (2, 5, None, [11, 12, 5, 6]),
        (2, 4, 6, [22, 23, 4, 5]),
    ],
)
def test_indices_of_units(unit_size, offset, stride, expected):
    group = Group("g", "head", 4, unit_size, nn.Identity())
    site = Site("w", nn.Linear(1, 24), 0, group, offset, stride)
    indices = site.indices(torch.tensor([3, 0]))
    assert indices.dtype == torch.int64 and indices.tolist() == expected


def test_the_weight_is_looked_up_when_asked_for():
    site = find_sites(tiny_llama())[0]
    replaced = nn.Parameter(torch.zeros_like(site.weight))
    site.module.weight = replaced
    assert site.weight is replaced and site.parameters()[0] is replaced


def test_an_unknown_architecture_is_told_what_was_seen_and_what_to_write():
    """Falcon's heads share one key and value: there are no KV heads to select from."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(vocab_size=8, multi_query=True, **sizes))
    with pytest.raises(ValueError) as error:
        find_sites(model)
    message = str(error.value)
    assert "no sites to expand in FalconForCausalLM (model_type 'falcon')" in message
    seen, known = message.split("Module names seen: ")[1].split("Known architectures: ")
    assert {"self_attention", "query_key_value", "dense", "mlp"} <= set(
        seen.rstrip(". ").split(", ")
    )
    assert known.startswith("gemma, gemma2, gemma3, gemma3_text, gpt2, gpt_neox, granite, llama, ")
    lines = message.split("and tested:\n")[1]
    table = eval(f"{{{lines}}}", {"Architecture": Architecture})
    assert table == {"falcon": ARCHITECTURES["llama"]} and lines.count("\n") == 4


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(model_type):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    config = AutoConfig.for_model(model_type, **sizes)
    with pytest.raises(ValueError, match=f"model_type '{model_type}'"):
        find_sites(AutoModelForCausalLM.from_config(config))


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


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_do_without_what_wrappers_put_in(wrapping):
    sites, plain = find_sites(WRAPPINGS[wrapping](tiny_llama())), find_sites(tiny_llama())
    assert [(s.name, s.axis, s.group.name) for s in sites] == [
        (s.name, s.axis, s.group.name) for s in plain
    ]


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


def test_a_list_that_is_empty_or_names_a_site_twice_is_refused():
    sites = find_sites(tiny_llama(layers=1))
    with pytest.raises(ValueError, match="no sites to expand: the list is empty"):
        check_sites([])
    with pytest.raises(ValueError, match="names a site twice"):
        check_sites(sites + sites[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_weights_are_refused(dtype):
    site = find_sites(tiny_llama().to(dtype))[3]
    with pytest.raises(ValueError, match="leave `master_weights_dtype` out") as error:
        check_sites([site])
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
    by_head = [dataclasses.replace(part, offset=i, stride=3) for i, part in enumerate(parts)]
    for fused in (parts, by_head):
        check_sites(fused)
        with pytest.raises(ValueError, match="1 and 3 are one tied weight"):
            check_sites([*fused, dataclasses.replace(fused[1], name="3")])
    with pytest.raises(ValueError, match="0 and 3 are one tied weight"):
        check_sites([*parts, dataclasses.replace(parts[1], offset=3, name="3")])
