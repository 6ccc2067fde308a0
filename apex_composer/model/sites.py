"""Sites: which weights of a model are expanded, along which axis, and in which units."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Unit = Literal["head", "kv_head", "channel"]

# Prefixes that wrappers put into parameter names; the names in state and logs do without them.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class Names(NamedTuple):
    """What an architecture calls its projections."""

    queries: str
    keys: str
    values: str
    fused: str | None  # queries, keys and values in one
    attention_output: str
    ffn_inputs: tuple[str, ...]
    ffn_output: str


_FFN = (("gate_proj", "up_proj"), "down_proj")
_LLAMA = Names("q_proj", "k_proj", "v_proj", None, "o_proj", *_FFN)
_MPT = Names("Wq", "Wk", "Wv", "Wqkv", "out_proj", *_FFN)

ARCHITECTURES: dict[str, Names] = {
    "llama": _LLAMA,  # Llama 1-3, TinyLLaMA
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "mpt": _MPT,  # llm-foundry's MPT and Hugging Face's
}


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one module of one layer.

    Attributes:
        name: unique in the model, for example `model.layers.0.self_attn.heads`.
        unit: `head`, `kv_head` or `channel`.
        units: number of them.
        unit_size: consecutive weight indices of one unit: head_dim, or 1 for a channel.
        probe: the projection whose input is the units' activation (o_proj, down_proj).
        assessed_by: for KV heads, the group of query heads whose scores they sum up.
    """

    name: str
    unit: Unit
    units: int
    unit_size: int
    probe: nn.Module
    assessed_by: "Group | None" = None


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix, the axis an operator acts on, and the group whose units lie there.

    Attributes:
        name: the weight's in the model, without wrappers' prefixes; with a fused projection
            the part is named behind it: `...Wqkv.weight[keys]`.
        module: the Linear that holds the weight (and the bias).
        axis: 0 where units are output rows, 1 where they are input columns.
        group: the units along the axis.
        offset: first index of the group's units along the axis (fused projections).
        model: where the site was found; FSDP's wrappers in it tell how the weight is sharded.
    """

    name: str
    module: nn.Module = field(repr=False)
    axis: Literal[0, 1]
    group: Group
    offset: int = 0
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it now (wrapping may replace the object)."""
        return self.module.weight

    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias of an expanded output row."""
        bias = getattr(self.module, "bias", None)
        return [self.weight, bias] if self.axis == 0 and bias is not None else [self.weight]

    def indices(self, units: Tensor) -> Tensor:
        """Indices along the axis of the given units: [k] -> [k * unit_size], int64."""
        within = torch.arange(self.group.unit_size, device=units.device)
        return (self.offset + units.unsqueeze(1) * self.group.unit_size + within).flatten()


def clean_name(name: str) -> str:
    """A parameter's or module's name without the prefixes of DDP, FSDP, compile, checkpointing."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def find_sites(model: nn.Module, targets: Sequence[str] | None = None) -> list[Site]:
    """All weights of a model that APEX expands, layer by layer.

    Attention: rows of the query, key and value projections, columns of the output projection.
    FFN: rows of the gate and up projections, columns of the down projection (paper eq. 7-11).
    Key and value rows are grouped by KV head; whether those are expanded is the Expander's
    `kv_heads` setting.

    Args:
        model: a Hugging Face or llm-foundry model, plain or wrapped.
        targets: kinds of units that there must be: `head` (with its KV heads), `channel`. Default
            None, all that there are.

    Returns:
        The sites in the model's order.

    Raises:
        ValueError: if the architecture is not known, or has none of the expected modules.
    """
    names = ARCHITECTURES.get(_model_type(model))
    if names is None:
        raise ValueError(_unknown_architecture(model))
    sites = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if names.attention_output in children and hasattr(module, "head_dim"):
            sites += _attention_sites(clean_name(name), module, names)
        elif names.ffn_output in children and names.ffn_inputs[-1] in children:
            sites += _ffn_sites(clean_name(name), children, names)
    if not sites:
        raise ValueError(_unknown_architecture(model))
    sites = [replace(site, model=model) for site in sites]
    return sites if targets is None else _of_targets(sites, targets)


def _of_targets(sites: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    missing = set(targets) - {site.group.unit for site in sites}
    if missing:
        raise ValueError(
            f"targets: got {list(targets)}, but this model has no sites of "
            f"{', '.join(sorted(missing))} (modules of an unknown kind): leave them out"
        )
    wanted = {*targets, *(["kv_head"] if "head" in targets else [])}
    return [site for site in sites if site.group.unit in wanted]


def _model_type(model: nn.Module) -> str | None:
    for module in model.modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type is not None:
            return model_type
    return None


def _attention_sites(name: str, attention: nn.Module, names: Names) -> Iterator[Site]:
    children = dict(attention.named_children())
    output, size = children[names.attention_output], attention.head_dim
    queries = output.in_features // size
    heads = Group(f"{name}.heads", "head", queries, size, output)
    if names.fused in children:
        yield from _fused_sites(f"{name}.{names.fused}.weight", children[names.fused], heads)
    if names.queries in children:
        yield Site(f"{name}.{names.queries}.weight", children[names.queries], 0, heads)
    pair = [wanted for wanted in (names.keys, names.values) if wanted in children]
    if pair:
        kv_heads = _kv_group(heads, children[pair[0]].out_features // size)
        for wanted in pair:
            yield Site(f"{name}.{wanted}.weight", children[wanted], 0, kv_heads)
    yield Site(f"{name}.{names.attention_output}.weight", output, 1, heads)


def _fused_sites(name: str, fused: nn.Module, heads: Group) -> Iterator[Site]:
    """Rows of a fused projection lie as all queries, then all keys, then all values."""
    query_rows = heads.units * heads.unit_size
    kv_rows = (fused.out_features - query_rows) // 2
    kv_heads = _kv_group(heads, kv_rows // heads.unit_size)
    yield Site(f"{name}[queries]", fused, 0, heads, 0)
    yield Site(f"{name}[keys]", fused, 0, kv_heads, query_rows)
    yield Site(f"{name}[values]", fused, 0, kv_heads, query_rows + kv_rows)


def _kv_group(heads: Group, units: int) -> Group:
    name = heads.name.removesuffix(".heads") + ".kv_heads"
    return Group(name, "kv_head", units, heads.unit_size, heads.probe, assessed_by=heads)


def _ffn_sites(name: str, children: dict[str, nn.Module], names: Names) -> Iterator[Site]:
    output = children[names.ffn_output]
    channels = Group(f"{name}.channels", "channel", output.in_features, 1, output)
    for wanted in names.ffn_inputs:
        if wanted in children:
            yield Site(f"{name}.{wanted}.weight", children[wanted], 0, channels)
    yield Site(f"{name}.{names.ffn_output}.weight", output, 1, channels)


def _unknown_architecture(model: nn.Module) -> str:
    seen = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    seen = [name for name in seen if not name.isdigit()]
    return (
        f"no sites to expand in {type(model).__name__} (model_type {_model_type(model)!r}). "
        f"Module names seen: {', '.join(seen) or 'none'}. Known architectures: "
        f"{', '.join(sorted(ARCHITECTURES))}. A new one is added in apex_composer/model/sites.py."
    )


def check_sites(sites: Sequence[Site]) -> None:
    """Refuse an empty list, a site named twice, tied weights, and those that cannot be expanded."""
    if not sites:
        raise ValueError("no sites to expand: the list is empty, see find_sites(model)")
    if len({site.name for site in sites}) < len(sites):
        raise ValueError("sites: the list names a site twice, see find_sites(model)")
    sharing: dict[tuple, list[tuple[Site, str]]] = {}
    for site in sites:
        _check_precision(site)
        for parameter, what in zip(site.parameters(), ("weight", "bias"), strict=False):
            sharing.setdefault(_memory(parameter), []).append((site, what))
    for several in sharing.values():
        for (first, what), (second, _) in combinations(several, 2):
            if _overlap(first, second):
                raise ValueError(
                    f"{first.name} and {second.name} are one tied {what}, whose rows two operators "
                    "would change. Allowed: weights and biases of their own. Untie them, or give "
                    "the Expander the sites of one of the two only"
                )


def _memory(parameter: nn.Parameter) -> tuple:
    """The same for parameters that begin at one address; for one without memory, its own."""
    address = 0 if isinstance(parameter, DTensor) else parameter.data_ptr()
    return ("address", address) if address else ("object", id(parameter))


def _overlap(first: Site, second: Site) -> bool:
    """Whether two operators on one weight meet: not so the parts of a fused projection."""
    ends = [site.offset + site.group.units * site.group.unit_size for site in (first, second)]
    apart = ends[0] <= second.offset or ends[1] <= first.offset
    return first.axis != second.axis or not apart


def _check_precision(site: Site) -> None:
    weight = site.weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{site.name} is held in {weight.dtype}, allowed: float32. Folding and unfolding "
            "every step would wear lower precisions away: set `master_weights_dtype: fp32` (and "
            "precision: amp_bf16 for the compute)"
        )
