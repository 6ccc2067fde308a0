"""Checks of settings: what was given, what is allowed, and what to do about it."""

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

KV_HEADS = ("auto", "expand", "skip")
TARGETS = ("head", "channel")
METHODS = ("rank", "average", "random")
ASSESSMENT_SETTINGS = ("method", "tokens", "interval")
IMPLEMENTATIONS = ("auto", "torch", "triton")
# What is trained, by how many of the sides P and N of every group are.
SIDES = {"all": 0, "selected": 2, "half": 2, "disadvantageous": 1}


def check_choice(setting: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`, proposing the nearest name.

    1 is not True here, and 0 not False: what is checked by `==` would later be tested by `is`.
    """
    allowed = list(allowed)
    if not any(type(value) is type(item) and value == item for item in allowed):
        names = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{setting}: got {value!r}, allowed: {names}{_proposal(value, allowed)}")


def check_keys(setting: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raise TypeError for the first unknown key, proposing the nearest known one."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise TypeError(
                f"{setting}: unknown key {key!r}{_proposal(key, allowed)} "
                f"Known: {', '.join(allowed)}"
            )


def check_threshold(threshold: Any, trainable: str = "all") -> float:
    """The threshold as a float; ValueError unless 0 < threshold <= 0.5 (`half`: or 0)."""
    zero = trainable == "half" and is_number(threshold) and threshold == 0
    if not zero and (not is_number(threshold) or not 0 < threshold <= 0.5):
        raise ValueError(
            f"threshold: got {threshold!r}, allowed: a number in (0, 0.5], the share of units on "
            "each side (paper: 0.125 for continued pre-training, 0.1875 for instruction tuning)"
        )
    return float(threshold)


def check_trainable(trainable: Any, share: Any) -> float | None:
    """The share as a float, or None; ValueError for another mode, or what is no share."""
    check_choice("trainable", trainable, SIDES)
    if share is None:
        return 0.52 if trainable == "half" else None
    if trainable == "all" or not is_number(share) or not 0 < share <= 1:
        raise ValueError(
            f"trainable_share: got {share!r} with trainable: {trainable}, allowed: a number in "
            "(0, 1], the share of parameters that are trained, with trainable: selected, half, "
            "disadvantageous"
        )
    return float(share)


def check_positive(setting: str, value: Any, kind: type = int) -> Any:
    """The value as a plain int or float; ValueError unless it is one, positive and finite."""
    if not is_number(value, kind) or not value > 0:
        raise ValueError(f"{setting}: got {value!r}, allowed: a positive {kind.__name__}")
    return kind(value)


def check_not_negative(setting: str, value: Any, highest: int | None = None) -> int:
    """The value as a plain int; ValueError unless it is one from 0 to `highest` (None: any)."""
    if not is_number(value, int) or value < 0 or (highest is not None and value > highest):
        limits = "of 0 or more" if highest is None else f"from 0 to {highest}"
        raise ValueError(f"{setting}: got {value!r}, allowed: an integer {limits}")
    return int(value)


def check_lr_scale(scale: Any) -> float | None:
    """The operators' learning rate over the weights' as a float, or None; ValueError for others."""
    return None if scale is None else check_positive("operator_lr_scale", scale, float)


def check_finite(setting: str, value: Any, allowed: str, lowest: float = -math.inf) -> float:
    """The value as a plain float; ValueError, naming what is allowed, unless it is a number."""
    if not is_number(value) or value < lowest:
        raise ValueError(f"{setting}: got {value!r}, allowed: {allowed}")
    return float(value)


def is_number(value: Any, kind: type = float) -> bool:
    """Whether it is a finite number: Python's or numpy's, for int an integer; never a bool."""
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return False
    if isinstance(value, Integral):
        return abs(int(value)) <= sys.float_info.max  # a larger one is no float
    return math.isfinite(value)


def check_flag(setting: str, value: Any) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{setting}: got {value!r}, allowed: true, false")


def check_same(setting: str, checkpoint: Any, now: Any) -> None:
    """Raise ValueError where a resumed run's setting differs from its checkpoint's."""
    if checkpoint != now:
        raise ValueError(
            f"{setting}: the checkpoint was trained with {checkpoint!r}, this run says {now!r}. "
            f"Set it back to {checkpoint!r} to resume, change it with `apex-composer branch`, or "
            "start a new run from the checkpoint's weights (load_weights_only: true)"
        )


def check_same_members(setting: str, checkpoint: list[str], now: list[str]) -> None:
    """Raise ValueError naming what a resumed run has more and less than its checkpoint."""
    if checkpoint != now:
        missing = [name for name in checkpoint if name not in now]
        added = [name for name in now if name not in checkpoint]
        raise ValueError(
            f"{setting}: the checkpoint has {_few(missing)} that this run does not have, this run "
            f"has {_few(added)} that the checkpoint does not have. Resume with the same model and "
            "`targets`, or start a new run from the weights (load_weights_only: true)"
        )


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _proposal(given: Any, allowed: list[Any]) -> str:
    near = difflib.get_close_matches(str(given), [str(item) for item in allowed], n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else "."


def check_targets(targets: Any) -> tuple[str, ...]:
    """The kinds of units in their usual order; ValueError for others or none."""
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not len(targets):
        raise ValueError(f"targets: got {targets!r}, allowed: a list of {', '.join(TARGETS)}")
    for target in targets:
        check_choice("targets", target, TARGETS)
    return tuple(target for target in TARGETS if target in targets)


def check_assessment(assessment: Mapping[str, Any]) -> tuple[str, int | None, int]:
    """`method`, `tokens` and `interval` of the setting `assessment`; raises for anything else."""
    if not isinstance(assessment, Mapping):
        raise ValueError(
            f"assessment: got {assessment!r}, allowed: a mapping of "
            f"{', '.join(ASSESSMENT_SETTINGS)}"
        )
    check_keys("assessment", assessment, ASSESSMENT_SETTINGS)
    method, tokens = assessment.get("method", "rank"), assessment.get("tokens")
    interval = assessment.get("interval", 1)
    check_choice("assessment: method", method, METHODS)
    interval = check_positive("assessment: interval", interval)
    if tokens is not None:
        tokens = check_positive("assessment: tokens", tokens)
    return method, tokens, interval
