"""`flops_per_batch` for models that have none, with which Composer's speed_monitor logs MFU."""

import logging
from typing import Any

from torch import nn

from apex_composer.model.flops import Flops
from apex_composer.model.sites import clean_name
from apex_composer.model.trained_parts import Roles, find_roles

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
    try:
        return find_roles(model)
    except ValueError as error:
        log.warning(_UNKNOWN, error)
        return None


def give(model: Any, roles: Roles) -> None:
    """Set the attribute `flops_per_batch`: plain numbers, which know nothing of the model.

    Args:
        model: the Composer model as it trains, wrapped or not.
        roles: of `read_plain`.
    """
    named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    unnamed = [name for name in roles.of if name not in named]
    if unnamed:  # FSDP1 without use_orig_params
        log.warning(_UNKNOWN, f"it shows no parameter {unnamed[0]} while it trains")
        return
    try:
        flops = roles.flops({name for name, p in named.items() if p.requires_grad})
    except ValueError as error:
        log.warning(_UNKNOWN, error)
        return
    setattr(_composer_model(model), _NAME, flops)
    log.info("start_guard: %d FLOPs a token, besides attention's products", flops.per_token)


def take_back(model: Any) -> None:
    """Leave a model as it was found."""
    plain = _composer_model(model)
    if isinstance(vars(plain).get(_NAME), Flops):
        delattr(plain, _NAME)


def _composer_model(model: Any) -> Any:
    """Below DDP."""
    return getattr(model, "module", model)
