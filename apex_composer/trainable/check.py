"""Whether a model suits the settings; looked at before anything is done to it."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from apex_composer.assessment.selection import count_by_group
from apex_composer.model.sites import Site, check_sites
from apex_composer.sharding.make_executors import check_executors
from apex_composer.trainable.shares import Share, share_of


def check_model(
    sites: Sequence[Site],
    threshold: float,
    kv_heads: str = "auto",
    expansion: bool = True,
    implementation: str = "auto",
    device: torch.device | None = None,
    *,
    trainable: str = "all",
    share: float | None = None,
    whole: Iterable[nn.Parameter] = (),
) -> tuple[list[Site], dict[str, int], Share | None]:
    """The sites that an `Expander` with these settings expands, and K of every group by name.

    The model is left alone. Arguments are those of `Expander`, already checked.

    Args:
        whole: parameters that are trained as they are.

    Returns:
        Sites, K by group, and what is trained where that is not everything.

    Raises:
        ValueError: as `Expander`, for what the model is like.
    """
    if trainable == "all":
        counts, found = count_by_group(sites, threshold, kv_heads), None
    else:
        check_sites(sites, copied=True)
        _check_sharding(sites)
        found = share_of(trainable, sites, kv_heads, threshold, share, whole)
        counts = found.counts
    expanded = [site for site in sites if site.group.name in counts]
    if expanded or found is None:
        check_sites(expanded, copied=found is not None)
    dtype = None if found is None else torch.float32
    check_executors(expanded, counts, implementation, device, expansion=expansion, dtype=dtype)
    return expanded, counts, found


def _check_sharding(sites: Sequence[Site]) -> None:
    models = {id(site.model): site.model for site in sites if site.model is not None}
    if any(isinstance(m, FSDP1) for model in models.values() for m in model.modules()):
        raise ValueError(
            "trainable: only rows of weights are trained, and FSDP1 gives no gradients of single "
            "weights before the step. Allowed: one process, DDP, FSDP2 (FSDP_VERSION=2)"
        )
