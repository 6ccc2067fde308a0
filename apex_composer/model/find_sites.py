"""Reads a model by the table of architectures: all sites that APEX can expand."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from apex_composer.model.architectures import ARCHITECTURES, Architecture, how_to_add
from apex_composer.model.sites import Group, Site, clean_name

_OTHER_LAYOUT = (
    "this model is not laid out as the table in apex_composer/model/architectures.py says"
)


def find_sites(model: nn.Module, targets: Sequence[str] | None = None) -> list[Site]:
    """All weights of a model that APEX expands, layer by layer.

    Attention: outputs of the query, key and value projections, inputs of the output projection.
    FFN: outputs of the gate and up projections, inputs of the down projection (paper eq. 7-11).
    Keys and values are grouped by KV head; whether those are expanded is the Expander's `kv_heads`
    setting.

    Args:
        model: a Hugging Face or llm-foundry model, plain or wrapped.
        targets: kinds of units that there must be: `head` (with its KV heads), `channel`. Default
            None, all that the architecture has; as many of both, in every layer.

    Returns:
        The sites in the model's order.

    Raises:
        ValueError: if the architecture is not known, has none of the expected modules, has them in
            some of its layers only, or in other shapes.
    """
    model_type = getattr(find_config(model), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(_nothing_found(model) + how_to_add(model_type))
    sites = [
        replace(site, model=model)
        for name, module in model.named_modules()
        for site in _module_sites(name, module, ARCHITECTURES[model_type])
    ]
    if not sites:
        raise ValueError(_nothing_found(model))
    if targets is not None:
        sites = _of_targets(sites, targets)
    row = ARCHITECTURES[model_type]
    both = bool(row.attention and row.ffn) if targets is None else len(set(targets)) == 2
    if both:
        _check_kinds(model, sites)
        _check_layers(model, sites)
    return sites


def _check_kinds(model: nn.Module, sites: Sequence[Site]) -> None:
    groups = {site.group.name: site.group.unit for site in sites}
    heads, channels = (list(groups.values()).count(unit) for unit in ("head", "channel"))
    if heads != channels:
        raise ValueError(
            f"{type(model).__name__} has {heads} attention and {channels} FFN modules of the known "
            "kinds, allowed: as many of both. Others (mixtures of experts) would be left out in "
            "silence: choose one kind, `targets: [head]` or `targets: [channel]`"
        )


def _check_layers(model: nn.Module, sites: Sequence[Site]) -> None:
    known = {site.module for site in sites}
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        unknown = [i for i, one in enumerate(layers) if known.isdisjoint(one.modules())]
        if 0 < len(unknown) < len(layers):
            kinds = {type(layers[i]).__name__ for i in unknown}
            raise ValueError(
                f"{clean_name(name)} has {len(layers)} layers, of which {unknown} "
                f"({', '.join(sorted(kinds))}) have no attention or FFN of the known kinds, and "
                "would be left out in silence: choose one kind, `targets: [head]` or "
                "`targets: [channel]`"
            )


def _of_targets(sites: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    missing = set(targets) - {site.group.unit for site in sites}
    if missing:
        raise ValueError(
            f"targets: got {list(targets)}, but this model has no sites of "
            f"{', '.join(sorted(missing))} (modules of an unknown kind): leave them out"
        )
    wanted = {*targets, *(["kv_head"] if "head" in targets else [])}
    return [site for site in sites if site.group.unit in wanted]


def find_config(model: nn.Module) -> Any:
    """The outermost configuration that names a model_type; None without one."""
    configs = (getattr(module, "config", None) for module in model.modules())
    named = (c for c in configs if getattr(c, "model_type", None) is not None)
    return next(named, None)


class _Projection(NamedTuple):
    """A child of an attention or FFN module, and what it holds."""

    name: str
    module: nn.Module
    parts: list[str]
    inputs: int
    outputs: int


def _module_sites(name: str, module: nn.Module, architecture: Architecture) -> Iterator[Site]:
    """The sites of one module; none if it is neither attention nor FFN."""
    children = dict(module.named_children())
    size = getattr(module, architecture.head_size, None)
    if size is not None and _has(children, architecture.attention, "queries"):
        found = _projections(name, children, architecture.attention, architecture.transposed)
        groups = _attention_groups(clean_name(name), found, size)
    elif _has(children, architecture.ffn, "up"):
        found = _projections(name, children, architecture.ffn, architecture.transposed)
        output = _output(found)
        channels = Group(f"{clean_name(name)}.channels", "channel", output.inputs, 1, output.module)
        groups = dict.fromkeys(("gate", "up", "output"), channels)
    else:
        return
    for projection in found:
        yield from _projection_sites(projection, groups, architecture)


def _has(children: Collection[str], table: Mapping[str, str], needed: str) -> bool:
    parts = {part for child in children for part in table.get(child, "").split()}
    return {needed, "output"} <= parts


def _projections(
    name: str, children: Mapping[str, nn.Module], table: Mapping[str, str], transposed: bool
) -> list[_Projection]:
    """The children that the table names, in its order."""
    # The weight's shape would be that of a shard under FSDP1.
    sizes = ("nx", "nf") if transposed else ("in_features", "out_features")
    found = []
    for child, parts in table.items():
        if child in children:
            full_name = clean_name(f"{name}.{child}.weight")
            inputs, outputs = (getattr(children[child], size, None) for size in sizes)
            if inputs is None or outputs is None:
                raise ValueError(
                    f"{full_name}: a {type(children[child]).__name__} does not say its sizes, "
                    f"{' and '.join(sizes)}: {_OTHER_LAYOUT}"
                )
            found.append(_Projection(full_name, children[child], parts.split(), inputs, outputs))
    _check_parts(found)
    return found


def _check_parts(found: Sequence[_Projection]) -> None:
    held = Counter(part for projection in found for part in projection.parts)
    if max(held.values()) > 1:
        names = ", ".join(projection.name for projection in found)
        raise ValueError(
            f"{names}: several hold {', '.join(part for part in held if held[part] > 1)}: "
            f"{_OTHER_LAYOUT}"
        )


def _output(found: Sequence[_Projection]) -> _Projection:
    return next(projection for projection in found if projection.parts == ["output"])


def _attention_groups(name: str, found: Sequence[_Projection], size: int) -> dict[str, Group]:
    """The group that the units of each part belong to."""
    output = _output(found)
    heads = Group(f"{name}.heads", "head", output.inputs // size, size, output.module)
    groups = {"queries": heads, "output": heads}
    for projection in found:
        pair = [part for part in projection.parts if part in ("keys", "values")]
        if pair and "keys" not in groups:
            rest = projection.outputs - projection.parts.count("queries") * output.inputs
            units = rest // (len(pair) * size)
            kv_name = f"{name}.kv_heads"
            kv_heads = Group(kv_name, "kv_head", units, size, output.module, assessed_by=heads)
            groups.update(keys=kv_heads, values=kv_heads)
    return groups


def _projection_sites(
    projection: _Projection, groups: Mapping[str, Group], architecture: Architecture
) -> Iterator[Site]:
    """A site for each part of a projection, at the place where its units begin."""
    name, module, parts, *_ = projection
    lengths = [groups[part].units * groups[part].unit_size for part in parts]
    by_head = architecture.by_head and len(parts) > 1
    outputs = parts != ["output"]
    _check_layout(projection, sum(lengths), groups, by_head)
    for place, part in enumerate(parts):
        size = groups[part].unit_size
        yield Site(
            name if len(parts) == 1 else f"{name}[{part}]",
            module,
            axis=int(outputs == architecture.transposed),
            group=groups[part],
            offset=place * size if by_head else sum(lengths[:place]),
            stride=len(parts) * size if by_head else None,
            transposed=architecture.transposed,
        )


def _check_layout(
    projection: _Projection, expected: int, groups: Mapping[str, Group], by_head: bool
) -> None:
    """Refuse a projection that cannot hold what the table says."""
    outputs = projection.parts != ["output"]
    found = projection.outputs if outputs else projection.inputs
    units = [groups[part].units for part in projection.parts]
    heads = groups[projection.parts[0]].assessed_by or groups[projection.parts[0]]
    shared = all(number > 0 and heads.units % number == 0 for number in units)
    if found != expected or not shared or (by_head and len(set(units)) > 1):
        raise ValueError(
            f"{projection.name} has {found} {'outputs' if outputs else 'inputs'}, and "
            f"{', '.join(projection.parts)} of {units} units would be {expected}: {_OTHER_LAYOUT}"
        )


def _nothing_found(model: nn.Module) -> str:
    model_type = getattr(find_config(model), "model_type", None)
    seen = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    seen = [name for name in seen if not name.isdigit()]
    return (
        f"no sites to expand in {type(model).__name__} (model_type {model_type!r}). "
        f"Module names seen: {', '.join(seen) or 'none'}. Known architectures: "
        f"{', '.join(sorted(ARCHITECTURES))}. "
    )
