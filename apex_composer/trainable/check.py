"""Whether a model suits the settings; looked at before anything is done to it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from apex_composer.assessment.selection import count_by_group
from apex_composer.model.sites import Site, check_sites
from apex_composer.sharding.make_executors import check_executors
from apex_composer.trainable.shares import Share, share_of

NO_FSDP1 = (
    "trainable: only rows of weights are trained, and FSDP1 gives no gradients of single weights "
    "before the step. Allowed: one process, DDP, FSDP2 (FSDP_VERSION=2)"
)


class Checked(NamedTuple):
    """What `check_model` has found.

    Attributes:
        sites: those that are expanded.
        counts: K of every group by name.
        share: what is trained, where that is not everything.
        trained: sites of which rows are trained.
        whole: parameters that are trained as they are beside them.
    """

    sites: list[Site]
    counts: dict[str, int]
    share: Share | None
    trained: list[Site]
    whole: list[nn.Parameter]


def check_model(
    sites: Sequence[Site],
    threshold: float,
    kv_heads: str = "auto",
    expansion: bool = True,
    implementation: str = "auto",
    device: torch.device | None = None,
    *,
    trainable: str = "all",
    trainable_share: float | None = None,
) -> Checked:
    """What an `Expander` with these settings, already checked, finds in a model.

    Raises:
        ValueError: as `Expander`, for what the model is like.
    """
    whole: list[nn.Parameter] = []
    if trainable == "all":
        counts, found = count_by_group(sites, threshold, kv_heads), None
    else:
        check_sites(sites, copied=True)
        _check_sharding(sites)
        whole = embeddings(sites[0].model) if trainable == "half" else []
        found = share_of(trainable, sites, kv_heads, threshold, trainable_share, whole)
        counts = found.counts
    expanded = [site for site in sites if site.group.name in counts]
    if expanded or found is None:
        check_sites(expanded, copied=found is not None)
    dtype = None if found is None else torch.float32
    check_executors(expanded, counts, implementation, device, expansion=expansion, dtype=dtype)
    trained = [] if found is None else _trained(sites, found)
    return Checked(expanded, counts, found, trained, whole)


def _trained(sites: Sequence[Site], share: Share) -> list[Site]:
    trained = [s for s in sites if share.counts.get(s.group.name) or share.filled.get(s.group.name)]
    if not trained:
        raise ValueError(
            f"trainable: no unit is trained: {share.describe()}. Give a larger threshold, or a "
            "larger trainable_share"
        )
    return trained


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a transformers model's input embeddings and of its output head.

    Raises:
        ValueError: it does not tell them.
    """
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            found = (module.get_input_embeddings(), module.get_output_embeddings())
            parameters = [p for own in found if own is not None for p in own.parameters()]
            if parameters:
                return list(dict.fromkeys(parameters))
    raise ValueError(
        "trainable: half trains embeddings and head as well, and the model does not tell which "
        "they are (get_input_embeddings, get_output_embeddings of transformers). Allowed: a model "
        "that does, or trainable: selected"
    )


def _check_sharding(sites: Sequence[Site]) -> None:
    models = {id(site.model): site.model for site in sites if site.model is not None}
    if any(isinstance(m, FSDP1) for model in models.values() for m in model.modules()):
        raise ValueError(NO_FSDP1)
