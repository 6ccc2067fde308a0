"""A resumed run's optimizer: its hyper-parameters are those of the run's own settings.

A checkpoint restores them together with the optimizer's moments, over what the settings say. What
the settings have changed since is put back; what schedulers, callbacks or the optimizer itself
have moved during training stays as it was.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

Settings = list[dict[str, Any]]

# Compared where a checkpoint does not tell its run's settings: other entries may be counters.
_KNOWN = ("lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha")
_KNOWN += ("maximize", "amsgrad", "centered")
# How torch computes, not what: the moments of a checkpoint lie where its own choice wants them.
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# Turned on, they need moments that the checkpoint does not have.
_NEED_MOMENTS = ("amsgrad", "centered", "momentum")
_PLAIN = bool | int | float | str | None


def read_settings(optimizer: Optimizer) -> Settings:
    """The hyper-parameters of every param group, plain data; `lr` is the base of schedulers.

    Args:
        optimizer: before a checkpoint is loaded.
    """
    groups = []
    for group in optimizer.param_groups:
        plain = {name: _plain(group[name]) for name in group if _is_setting(name, group[name])}
        if "lr" in plain:
            plain["lr"] = plain.pop("initial_lr", plain["lr"])
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
    """
    loaded = read_settings(optimizer)
    if trained is None or len(trained) != len(given):
        trained = [{name: group[name] for name in _KNOWN if name in group} for group in loaded]
    told: dict[str, None] = {}  # a set in order: groups mostly say the same
    for group, now, before, held in zip(
        optimizer.param_groups, given, trained, loaded, strict=True
    ):
        for name, value in now.items():
            if value in (before.get(name, value), held.get(name)):
                continue
            if name == "lr" and schedulers is None:
                continue
            fits = name not in _IMPLEMENTATION and (before[name] or name not in _NEED_MOMENTS)
            told[_line(name, before[name], value, fits)] = None
            if fits:
                _set(group, name, value)
    if told:
        warnings.warn("; ".join(told), stacklevel=2)
    for scheduler in schedulers or ():
        if hasattr(scheduler, "base_lrs") and any(line.startswith("lr: ") for line in told):
            scheduler.base_lrs = [group["lr"] for group in given]


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if name != "lr":
        group[name] = tuple(value) if isinstance(group[name], tuple) else value
        return
    base = group.get("initial_lr", group["lr"])
    group["lr"] = group["lr"] / base * value if base else value
    if "initial_lr" in group:
        group["initial_lr"] = value


def _line(name: str, before: Any, value: Any, fits: bool) -> str:
    end = (
        "which holds from here on"
        if fits
        else "but the optimizer's state goes with the former, which stays. To change it, start a "
        "new run from the weights (load_weights_only: true)"
    )
    return f"{name}: the checkpoint was trained with {before}, this run says {value}, {end}"


def _is_setting(name: str, value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return name != "params" and all(isinstance(item, _PLAIN) for item in values)


def _plain(value: Any) -> Any:
    """As checkpoints keep it: lists, and Python's own floats."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, float) else value
