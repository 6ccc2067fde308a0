"""What every architecture's sites are held to, and the layers of an MPT by its weights' names."""

from collections import defaultdict

import torch
from helpers import tokens
from torch import nn

from apex_composer.model.sites import Group, Site

FUSED = [
    ("attn.Wqkv.weight[queries]", 0, "attn.heads"),
    ("attn.Wqkv.weight[keys]", 0, "attn.kv_heads"),
    ("attn.Wqkv.weight[values]", 0, "attn.kv_heads"),
]
OUT_PROJ = ("attn.out_proj.weight", 1, "attn.heads")
UP = ("ffn.up_proj.weight", 0, "ffn.channels")
VALUES = ("v_proj.weight", "Wv.weight", "[values]")
DOWN = ("ffn.down_proj.weight", 1, "ffn.channels")


def laid_out(sites: list[Site]) -> list[tuple]:
    return [(site.name, site.axis, site.group.name) for site in sites]


def in_layers(prefix: str, layer: list[tuple], layers: int = 2) -> list[tuple]:
    return [
        (f"{prefix}.{i}.{name}", axis, f"{prefix}.{i}.{group}")
        for i in range(layers)
        for name, axis, group in layer
    ]


def check_weights(model: nn.Module, sites: list[Site]) -> None:
    """A site's name is its weight's name, and the units of its sites fill a weight's axis."""
    parameters = dict(model.named_parameters())
    indices: dict[str, list[int]] = defaultdict(list)
    for site in sites:
        name = site.name.split("[")[0]
        assert site.weight is parameters[name]
        bias = parameters.get(name.removesuffix("weight") + "bias")
        outputs = site.module is not site.group.probe
        expected = [site.weight, bias] if bias is not None and outputs else [site.weight]
        assert len(site.parameters()) == len(expected)
        assert all(a is b for a, b in zip(site.parameters(), expected, strict=True))
        indices[name] += site.indices(torch.arange(site.group.units)).tolist()
        assert sorted(indices[name])[-1] < site.weight.shape[site.axis]
    for site in sites:
        assert sorted(indices[site.name.split("[")[0]]) == list(range(site.weight.shape[site.axis]))


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
    """Changing one unit's outputs changes that unit's activation in its layer and no other unit's.

    For a KV head: of the query heads that share it. A token that sees no other reads values alone.
    For inputs: zeroing a unit's weights is the same as zeroing its activation.
    """
    for site in sites:
        for unit in (0, site.group.units - 1):
            saved = [p.detach().clone() for p in site.parameters()]
            check = _check_inputs if site.module is site.group.probe else _check_outputs
            with torch.no_grad():
                check(model, site, unit)
                for parameter, value in zip(site.parameters(), saved, strict=True):
                    parameter.copy_(value)


def _check_inputs(model: nn.Module, site: Site, unit: int) -> None:
    activation = torch.randn(3, site.group.units, site.group.unit_size)
    removed = activation.clone()
    removed[:, unit] = 0
    expected = site.module(removed.flatten(1))
    site.weight.index_fill_(site.axis, site.indices(torch.tensor([unit])), 0)
    torch.testing.assert_close(site.module(activation.flatten(1)), expected)


def _check_outputs(model: nn.Module, site: Site, unit: int) -> None:
    heads = site.group.assessed_by or site.group
    before = inputs_of_probes(model, [heads])[heads.name]
    indices = site.indices(torch.tensor([unit]))
    for parameter in site.parameters():
        axis = site.axis if parameter.dim() == 2 else 0
        change = 1.5 + torch.rand_like(parameter.index_select(axis, indices))
        parameter.index_add_(axis, indices, change)
    changed = (inputs_of_probes(model, [heads])[heads.name] != before).any(-1)
    shared = heads.units // site.group.units
    expected = list(range(unit * shared, (unit + 1) * shared))
    assert changed.flatten(0, 1).any(0).nonzero().flatten().tolist() == expected, (site.name, unit)
    if heads.unit == "head":
        values = site.name.endswith(VALUES)
        assert changed[:, 0].any(0).nonzero().flatten().tolist() == (expected if values else [])
