"""A resumed run's optimizer: its hyper-parameters are those of the run's own settings.

A checkpoint restores them together with the optimizer's moments, over what the settings say. What
the settings have changed since is put back; what schedulers, callbacks or the optimizer itself
have moved during training stays as it was. A checkpoint without a record of its run's settings
does not tell the two apart: there the settings hold, with a warning.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apex_composer.model.sites import clean_name

Settings = list[dict[str, Any]]

# Compared where a checkpoint does not tell its run's settings: other entries may be counters.
_KNOWN = ("lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha")
_KNOWN += ("maximize", "amsgrad", "centered")
# How torch computes, not what: the moments of a checkpoint lie where its own choice wants them.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# Turned on, they need moments that the checkpoint does not have.
_NEED_MOMENTS = ("amsgrad", "centered", "momentum")


def read_settings(optimizer: Optimizer, model: nn.Module | None = None) -> Settings:
    """The hyper-parameters of every param group, plain data; `lr` is the base of schedulers.

    Args:
        optimizer: before a checkpoint is loaded.
        model: names the parameters of every group, under `params`. Default: no names.
    """
    named = model.named_parameters() if model is not None else ()
    names = {id(parameter): clean_name(name) for name, parameter in named}
    groups = []
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        plain = {name: _plain(value) for name, value in settings.items() if _is_plain(value)}
        if "lr" in plain:
            plain["lr"] = plain.pop("initial_lr", plain["lr"])
        if all(id(parameter) in names for parameter in group["params"]):
            plain["params"] = sorted(names[id(parameter)] for parameter in group["params"])
        groups.append(plain)
    return groups


def put_back(
    optimizer: Optimizer,
    given: Settings,
    trained: Settings | None,
    schedulers: Sequence[Any] | None = None,
) -> None:
    """Undo what loading a checkpoint did to changed settings, with a warning that names both.

    Args:
        optimizer: with the checkpoint's state.
        given: `read_settings` of this run.
        trained: of the checkpoint's run; None where it does not tell: what was loaded counts.
        schedulers: that take their base learning rates from the optimizer; None leaves learning
            rates to others.

    Raises:
        ValueError: for other param groups than the checkpoint's, or another order of them.
    """
    loaded, recorded = read_settings(optimizer), trained is not None
    if trained is None:
        trained = [{name: group[name] for name in _KNOWN if name in group} for group in loaded]
    _check_groups(trained, given)
    told: dict[str, None] = {}  # a set in order: groups mostly say the same
    for group, now, before, held in zip(
        optimizer.param_groups, given, trained, loaded, strict=True
    ):
        for name, value in now.items():
            if name == "params" or value in (before.get(name, value), held.get(name)):
                continue
            if name == "lr" and schedulers is None:
                continue
            fits = name not in _IMPLEMENTATION and (before[name] or name not in _NEED_MOMENTS)
            told[_line(name, before[name], value, fits, recorded)] = None
            if fits:
                _set(group, name, value)
    # Schedulers are loaded by the groups' order, and also where the optimizer is not. Where the
    # settings have the same rates as before, it was training that has moved the base rates.
    changed = [group.get("lr") for group in trained] != [group.get("lr") for group in given]
    if changed if recorded else optimizer.state:
        line = set_base_rates(optimizer, schedulers or ())
        if line and not any(other.startswith("lr: ") for other in told):
            told[line] = None
    if told:
        warnings.warn("; ".join(told), stacklevel=2)


def set_base_rates(optimizer: Optimizer, schedulers: Iterable[Any]) -> str | None:
    """Give schedulers, and those within them, the base learning rates of the param groups.

    Returns:
        What a warning has to say of other ones that they had, or None.
    """
    rates, line = [_base(group) for group in optimizer.param_groups], None
    for scheduler in _leaves(schedulers):
        old = getattr(scheduler, "base_lrs", None)
        if old is not None and _plain(old) != _plain(rates):
            line = (
                f"lr: the checkpoint's scheduler has the base rates {_plain(old)}, the param "
                f"groups {_plain(rates)}, which hold from here on"
            )
            scheduler.base_lrs = [alike(rate, float(rate)) for rate in rates]
    return line


def alike(old: Any, value: Any) -> Any:
    """The value as the kind of number that the old one is, so that it is rounded as before."""
    if isinstance(value, bool) or not isinstance(value, Real) or isinstance(old, Integral):
        return value
    if isinstance(old, Tensor):
        return torch.full_like(old, value)
    return type(old)(value) if isinstance(old, Real) else value


def _check_groups(trained: Settings, given: Settings) -> None:
    """Refuse other groups: schedulers and this record go by their order, moments by name."""
    difference = None
    if len(trained) != len(given):
        difference = f"the checkpoint has {len(trained)} param groups, this run has {len(given)}"
    for place, (before, now) in enumerate(zip(trained, given, strict=False)):
        one, other = (set(group.get("params", ())) for group in (before, now))
        if one and other and one != other and difference is None:
            difference = (
                f"param group {place} has {min(one ^ other)!r} in only one of the checkpoint and "
                "this run"
            )
    if difference is not None:
        raise ValueError(
            f"optimizer: {difference}. Allowed: the same param groups in the same order. Give "
            "them as the checkpoint's run did, or start a new run from the weights "
            "(load_weights_only: true)"
        )


def _leaves(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and instead of torch's SequentialLR and ChainedScheduler those within them."""
    for scheduler in schedulers:
        within = getattr(scheduler, "_schedulers", None)
        yield from [scheduler] if within is None else _leaves(within)


def _base(group: dict[str, Any]) -> Any:
    return group.get("initial_lr", group["lr"])


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if name != "lr":
        old = group[name]
        group[name] = tuple(value) if isinstance(old, tuple) else alike(old, value)
        return
    base = _base(group)
    group["lr"] = group["lr"] / base * value if base else alike(base, value)
    if "initial_lr" in group:
        group["initial_lr"] = alike(base, value)


def _line(name: str, before: Any, value: Any, fits: bool, recorded: bool) -> str:
    end = (
        "which holds from here on"
        if fits
        else "but the optimizer's state goes with the former, which stays. To change it, start a "
        "new run from the weights (load_weights_only: true)"
    )
    if recorded:
        return f"{name}: the checkpoint was trained with {before}, this run says {value}, {end}"
    return (
        f"{name}: the checkpoint goes on with {before}, this run says {value}, {end} (the "
        "checkpoint does not record its run's settings. If training itself has moved the value, "
        f"set it to {before} to go on as it was)"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return value is None or isinstance(value, str | Real)


def _plain(value: Any) -> Any:
    """As checkpoints keep it: lists, and Python's own numbers."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value  # of a tensor, or numpy's
