"""What the settings of GaLore, APOLLO and Muon may be, in `optimizer` and in its `param_groups`."""

from collections.abc import Mapping, Sequence
from typing import Any

from apex_composer import settings

_RATES = ("lr", "weight_decay", "eps", "adamw_lr", "adamw_wd", "adamw_eps")
_COUNTS = ("rank", "update_proj_gap", "ns_steps")
_FLAGS = ("matrices", "nesterov", "weight_decouple", "use_adjusted_lr", "maximize")


def check_values(name: str, given: Mapping[str, Any]) -> None:
    """Refuse values that are out of range, before or behind an optimizer is made.

    Args:
        name: the optimizer's, for errors.
        given: its settings, or a param group.

    Raises:
        ValueError: naming the setting, what was given, and what is allowed.
    """
    for setting, value in given.items():
        told = f"{name}: {setting}"
        if setting in _RATES:
            settings.check_finite(told, value, "a finite number of 0 or more", 0.0)
        elif setting in _COUNTS:
            settings.check_positive(told, value)
        elif setting in _FLAGS:
            settings.check_flag(told, value)
        elif setting == "scale":
            settings.check_positive(told, value, float)
        elif setting == "momentum" and not _is_decay(value):
            raise ValueError(f"{told}: got {value!r}, allowed: a number in [0, 1)")
        elif setting in ("betas", "adamw_betas") and not _are_betas(value):
            raise ValueError(f"{told}: got {value!r}, allowed: two numbers in [0, 1)")


def _is_decay(value: Any) -> bool:
    return settings.is_number(value) and 0 <= value < 1


def _are_betas(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_decay, value))
