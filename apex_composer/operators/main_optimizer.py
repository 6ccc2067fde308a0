"""The user's optimizer: whether the operators' AdamW can follow it, and by which numbers."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import ASGD, Optimizer

from apex_composer.model.sites import Site
from apex_composer.settings import is_number

# Where the main optimizer has no such setting (SGD, Lion's eps): AdamW's usual ones for LLMs.
DEFAULT_BETAS = (0.9, 0.95)
DEFAULT_EPS = 1e-8

# Parts of the names of optimizers that keep weights beside moments of gradients: slow ones
# (Lookahead, Ranger), averages (ScheduleFree), those of the start (MADGRAD, Prodigy, D-Adaptation).
_KEEP_WEIGHTS = ("schedulefree", "lookahead", "ranger", "madgrad", "prodigy", "dadapt")
# Parts of the names of optimizers with betas whose learning rates are not of Adam's size.
_OTHER_RATES = ("lion", "lamb", "novograd", "galore", "apollo")


def followed(group: Mapping[str, Any], lr_scale: float) -> dict[str, Any]:
    """What the operators' AdamW takes over from a param group of the main optimizer.

    Args:
        group: the one that the expanded weight is in.
        lr_scale: the operators' learning rate over the group's.
    """
    return {
        "lr": group["lr"] * lr_scale,
        "betas": tuple(group.get("betas", DEFAULT_BETAS)),
        "eps": group.get("eps", DEFAULT_EPS),
        "maximize": group.get("maximize", False),
    }


def param_group_places(sites: Sequence[Site], optimizer: Optimizer) -> list[int]:
    """For every site, which of the optimizer's param groups holds its weight.

    Raises:
        ValueError: naming the first weight or bias that the optimizer does not train; or for an
            optimizer that would be followed wrongly, or only up to its first step.
    """
    places = {
        id(parameter): place
        for place, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    for site in sites:
        for parameter in site.parameters():
            if id(parameter) not in places or not parameter.requires_grad:
                raise ValueError(_untrained(site, bias=parameter is not site.weight))
    found = [places[id(site.weight)] for site in sites]
    _check_followable(optimizer, found)
    return found


def _untrained(site: Site, bias: bool) -> str:
    if not bias:
        return (
            f"{site.name} is not trained by the optimizer (frozen, or left out of it): APEX "
            "expands weights that are trained. Unfreeze it, or leave its kind out with `targets`"
        )
    return (
        f"the bias of {site.name} is not trained by the optimizer (frozen, or left out of it), "
        "but its weight is: the bias of an expanded row is expanded with it, so a frozen one would "
        "move. Unfreeze it and give it to the optimizer, or leave its kind out with `targets`"
    )


def _check_followable(optimizer: Optimizer, places: Iterable[int]) -> None:
    """Refuse one that keeps weights of its own, or has settings that AdamW cannot take over."""
    kind = type(optimizer).__name__
    if keeps_weights(optimizer):
        raise ValueError(
            f"the optimizer {kind} keeps weights of its own (as Lookahead and ScheduleFree do, and "
            "wrappers may). APEX puts other weights in place around its steps and at the ends of "
            "stages, which it would mix with those. Allowed: an optimizer that keeps moments of "
            "gradients only. Use AdamW (llm-foundry: decoupled_adamw)"
        )
    for place in sorted(set(places)):
        for setting, (good, allowed) in _CHECKS.items():
            value = optimizer.param_groups[place].get(setting)
            # None counts as missing, but for the learning rate, which has to be there.
            if not good(value) and not (value is None and setting != "lr"):
                raise ValueError(
                    f"optimizer: {setting} of {kind} is {value!r}, allowed with apex: {allowed}. "
                    "The operators' AdamW takes it over at every step. Use AdamW (llm-foundry: "
                    "decoupled_adamw), or give this one such a value"
                )


def warn_of_other_rates(optimizer: Optimizer, places: Iterable[int]) -> None:
    """Warn where the learning rates are not of a size that suits AdamW, which trains operators."""
    has_betas = all("betas" in optimizer.param_groups[place] for place in places)
    if _named(optimizer, _OTHER_RATES) or not has_betas:
        warnings.warn(
            "operator_lr_scale: not given. AdamW trains the operators, at the learning rate of "
            f"{type(optimizer).__name__}, which is not of AdamW's size (Lion's is 3 to 10 times "
            "smaller, SGD's larger): give the ratio of a good AdamW learning rate to this one, or "
            "1.0 if that is meant",
            stacklevel=4,
        )


def keeps_weights(optimizer: Optimizer) -> bool:
    """By name; by ScheduleFree's two modes; torch's averaged SGD; or as it wraps another one."""
    modes = [callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")]
    wraps = isinstance(getattr(optimizer, "optimizer", None), Optimizer)
    return _named(optimizer, _KEEP_WEIGHTS) or all(modes) or wraps or isinstance(optimizer, ASGD)


def _named(optimizer: Optimizer, parts: Iterable[str]) -> bool:
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return any(part in name for name in names for part in parts)


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_rate(value: Any) -> bool:
    return _not_negative(
        value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    )


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and all(_not_negative(beta) and beta < 1 for beta in value)


_CHECKS = {
    "lr": (_is_rate, "a finite number of 0 or more"),
    "betas": (_are_betas, "two numbers from 0 to below 1"),
    "eps": (_not_negative, "a finite number of 0 or more"),
    "maximize": (lambda value: isinstance(value, bool), "true, false"),
}
