"""Whether a model suits the settings; looked at before anything is done to it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from apex_composer.assessment.selection import count_by_group
from apex_composer.model.sites import Group, Site, check_sites, clean_name
from apex_composer.sharding.make_executors import check_executors
from apex_composer.sharding.shards import reshard
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
        trained: sites of which rows are trained; where embeddings and head are held in a lower
            precision than float32, these are among them, with all of their rows.
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
        reshard(sites)  # while weights are gathered, the model shows others than are trained
        both = embeddings(sites[0].model) if trainable == "half" else []
        parameters = [parameter for site in both for parameter in site.parameters()]
        asked = threshold, trainable_share, parameters, expansion
        found = share_of(trainable, sites, kv_heads, *asked)
        counts = found.counts
        if all(p.dtype in (torch.float32, torch.float64) for p in parameters):
            whole = parameters
        else:
            sites = [*sites, *both]
            found.filled.update({site.group.name: site.group.units for site in both})
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


def embeddings(model: nn.Module) -> list[Site]:
    """A transformers model's input embeddings and output head, one site where they are tied.

    Raises:
        ValueError: it does not tell them.
    """
    names = {module: clean_name(name) for name, module in model.named_modules()}
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            found = (module.get_input_embeddings(), module.get_output_embeddings())
            own = {id(each.weight): each for each in reversed(found) if each is not None}
            if own:
                return [_all_rows(names[each], each, model) for each in reversed(own.values())]
    raise ValueError(
        "trainable: half trains embeddings and head as well, and the model does not tell which "
        "they are (get_input_embeddings, get_output_embeddings of transformers). Allowed: a model "
        "that does, or trainable: selected"
    )


def _all_rows(name: str, module: nn.Module, model: nn.Module) -> Site:
    """A weight, and its bias, whose rows are all trained."""
    group = Group(f"{name}.rows", "row", module.weight.shape[0], 1, module)
    return Site(f"{name}.weight", module, 0, group, model=model)


def _check_sharding(sites: Sequence[Site]) -> None:
    models = {id(site.model): site.model for site in sites if site.model is not None}
    if any(isinstance(m, FSDP1) for model in models.values() for m in model.modules()):
        raise ValueError(NO_FSDP1)
