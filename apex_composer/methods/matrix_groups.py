"""Which weights GaLore, APOLLO and Muon train as matrices: those of attention and FFN.

llm-foundry gives an optimizer parameters without names, but makes param groups by name before. So
the configuration's transform adds a group of the projections that APEX knows, `matrices: true`; all
others (embeddings, head, norms, biases) are trained by AdamW.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from apex_composer.model.architectures import ARCHITECTURES
from apex_composer.settings import check_keys

OPTIMIZERS = ("galore", "apollo", "muon")
_PROJECTIONS = {name for own in ARCHITECTURES.values() for name in (*own.attention, *own.ffn)}
PATTERN = rf"\.({'|'.join(sorted(_PROJECTIONS))})\.weight$"
# A projection that every layer of GPT-2 has, and no layer of an architecture with plain weights.
_TRANSPOSED = r"\.c_attn\.weight$"

Settings = dict[str, Any]


def add_matrix_group(config: Settings) -> Settings:
    """Give these optimizers the group of their matrices; runs in every llm-foundry training.

    Param groups that are given are left as they are; one of them has to say `matrices: true`.

    Args:
        config: the configuration, before llm-foundry reads it. Not modified.

    Raises:
        ValueError: for a run that will shard the matrices.
    """
    optimizer = config.get("optimizer") if isinstance(config, Mapping) else None
    name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
    if name not in OPTIMIZERS:
        return config
    sharded = next((key for key in ("fsdp_config", "tp_config") if config.get(key)), None)
    if sharded and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # one process takes no notice of it
        raise ValueError(_sharded(name, f"got {sharded} on several ranks"))
    if "param_groups" in optimizer:
        return config
    groups = [{"param_str_match": PATTERN, "matrices": True}]
    if name == "muon":
        groups.insert(0, {"param_str_match": _TRANSPOSED, "matrices": True, "transposed": True})
    return {**config, "optimizer": {**optimizer, "param_groups": groups}}


def check_matrices(name: str, params: Iterable[Any], known: Iterable[str]) -> list[Settings]:
    """Param groups as a list of their own, one of which at least has matrices.

    Args:
        name: the optimizer's, for errors.
        params: what llm-foundry gives, or any list of groups.
        known: settings that a group may have of its own.

    Raises:
        ValueError: no group has matrices that are trained, or one has something else.
        TypeError: a group has an unknown setting.
    """
    groups = [dict(own) if isinstance(own, Mapping) else {"params": [own]} for own in params]
    for group in groups:
        check_keys(f"{name}: param_groups", group, ("params", "matrices", *known))
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
    matrices = [p for group in groups if group.get("matrices") for p in group["params"]]
    others = [list(parameter.shape) for parameter in matrices if parameter.dim() != 2]
    if others or not any(parameter.requires_grad for parameter in matrices):
        found = f"a parameter of shape {others[0]} in" if others else "no trained parameter in"
        raise ValueError(
            f"optimizer: {name}: {found} the param groups with `matrices: true`, needed: weights "
            "of two dimensions, of attention and FFN. Where `param_groups` are left out these are "
            "found by name in a model that apex knows (without adapters); give, for example, "
            r"param_groups: [{param_str_match: 'proj\.weight$', matrices: true}]"
        )
    return groups


def check_whole(name: str, parameter: Tensor) -> None:
    """Refuse a step on a part of a matrix.

    Raises:
        ValueError: it is sharded.
    """
    if isinstance(parameter, DTensor) or parameter.dim() != 2:
        raise ValueError(_sharded(name, "got a weight that is sharded"))


def _sharded(name: str, given: str) -> str:
    return (
        f"optimizer: {name}: {given}, allowed: one process, or DDP. It works on whole matrices, of "
        "which each rank would hold a part. Remove the sharding, or use AdamW"
    )
