"""`flops_per_batch` for models that have none, with which Composer's speed_monitor logs MFU."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from apex_composer.extras import needing
from apex_composer.model.flops import Flops
from apex_composer.model.sites import clean_name
from apex_composer.model.trained_parts import Roles, find_roles

with needing("StartGuard"):
    from composer.models import ComposerModel

log = logging.getLogger(__name__)

_NAME = "flops_per_batch"
_UNKNOWN = (
    "start_guard: speed_monitor will log neither flops_per_sec nor MFU for this model. Give its "
    "class a method flops_per_batch(batch), or add its architecture: %s"
)


def read_plain(model: nn.Module) -> Roles | None:
    """What is needed to count a model's FLOPs once it trains.

    Args:
        model: the Composer model, before anything wraps it.

    Returns:
        None for a model that has a `flops_per_batch` of its own, and for one that is not known,
        which is logged with the reason.
    """
    own = getattr(model, _NAME, None)
    if own is not None and not isinstance(own, Flops):
        return None
    return _attempt(lambda: find_roles(model))


def give(model: nn.Module, roles: Roles, batch: Any) -> None:
    """Set the attribute `flops_per_batch`: plain numbers, which know nothing of the model.

    Args:
        model: the Composer model as it trains, wrapped or not.
        roles: of `read_plain`.
        batch: what it trains on next.
    """
    take_back(model)  # what was counted before would be wrong where it cannot be counted now
    flops = _attempt(lambda: _count(model, roles, batch))
    if flops is not None:
        setattr(_composer_model(model), _NAME, flops)
        log.info("start_guard: %d FLOPs a token, besides attention's products", flops.per_token)


def take_back(model: nn.Module) -> None:
    """Leave a model as it was found."""
    plain = _composer_model(model)
    if isinstance(vars(plain).get(_NAME), Flops):
        delattr(plain, _NAME)


def _count(model: nn.Module, roles: Roles, batch: Any) -> Flops:
    named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    unnamed = [name for name in roles.of if name not in named]
    if unnamed:  # FSDP1 without use_orig_params
        raise ValueError(f"it shows no parameter {unnamed[0]} while it trains")
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or ids.dim() != 2:  # speed_monitor would end the run over it
        raise ValueError("its batches have no input_ids of sequences and tokens")
    return roles.flops({name for name, p in named.items() if p.requires_grad})


def _attempt(count: Callable[[], Any]) -> Any:
    """What is counted; None and a warning for whatever fails: it is no reason not to train."""
    try:
        return count()
    except Exception as error:
        known = isinstance(error, ValueError)
        log.warning(_UNKNOWN, error if known else f"{type(error).__name__}: {error}")
        return None


def _composer_model(model: nn.Module) -> nn.Module:
    """Below DDP, as speed_monitor looks for it."""
    return model if isinstance(model, ComposerModel) else model.module
