"""What every architecture's sites are held to, and the layers of an MPT by its weights' names."""

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
