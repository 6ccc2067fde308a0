"""Sites: which weights of a model are expanded, along which axis, and in which units."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Unit = Literal["head", "kv_head", "channel", "row"]

# Prefixes that wrappers put into parameter names; the names in state and logs do without them.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one module of one layer.

    Attributes:
        name: unique in the model, for example `model.layers.0.self_attn.heads`.
        unit: `head`, `kv_head` or `channel`; `row` of a weight that is trained, and not expanded.
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
        module: the projection that holds the weight (and the bias).
        axis: where the units lie. 0: they are rows, a Linear's outputs. 1: columns, its inputs.
        group: the units along the axis.
        offset: first index of the group's units along the axis (fused projections). Default 0.
        stride: from a unit's first index to the next one's. Default unit_size; more where fused
            queries, keys and values lie head by head.
        transposed: whether the weight is [inputs, outputs], as that of transformers' Conv1D.
        model: where the site was found; FSDP's wrappers in it tell how the weight is sharded.
    """

    name: str
    module: nn.Module = field(repr=False)
    axis: Literal[0, 1]
    group: Group
    offset: int = 0
    stride: int | None = None
    transposed: bool = False
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it now (wrapping may replace the object)."""
        return self.module.weight

    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where the units are outputs."""
        bias = getattr(self.module, "bias", None)
        outputs = self.axis == int(self.transposed)
        return [self.weight, bias] if outputs and bias is not None else [self.weight]

    def indices(self, units: Tensor) -> Tensor:
        """Indices along the axis of the given units: [k] -> [k * unit_size], int64."""
        size = self.group.unit_size
        within = torch.arange(size, device=units.device)
        return (self.offset + units.unsqueeze(1) * (self.stride or size) + within).flatten()


def clean_name(name: str) -> str:
    """A parameter's or module's name without the prefixes of DDP, FSDP, compile, checkpointing."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def projection_of(name: str) -> str:
    """What a weight, or a part of a fused one, is in its layer: `q_proj`, `Wqkv[keys]`.

    Two that GPT-2 calls alike are told apart: `attn.c_proj` and `mlp.c_proj`.
    """
    parts = name.replace(".weight", "").split(".")
    kept = 2 if parts[-1] == "bias" else 1
    return ".".join(parts[-kept - parts[-kept].startswith("c_proj") :])


def check_sites(sites: Sequence[Site], copied: bool = False) -> None:
    """Refuse an empty list, a site named twice, tied weights, and those that cannot be expanded.

    Args:
        sites: those that are trained.
        copied: whether training acts on copies in full precision, beside the model. Default False.
    """
    if not sites:
        raise ValueError("no sites to expand: the list is empty, see find_sites(model)")
    if len({site.name for site in sites}) < len(sites):
        raise ValueError("sites: the list names a site twice, see find_sites(model)")
    sharing: dict[tuple, list[tuple[Site, str]]] = {}
    for site in sites:
        if not copied:
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
    indices = [site.indices(torch.arange(site.group.units)) for site in (first, second)]
    return first.axis != second.axis or bool(torch.isin(*indices).any())


def _check_precision(site: Site) -> None:
    weight = site.weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{site.name} is held in {weight.dtype}, allowed: float32. Folding and unfolding "
            "every step would wear lower precisions away: leave `master_weights_dtype` out (and "
            "set precision: amp_bf16 for the compute), or train rows only (`trainable: selected`)"
        )
