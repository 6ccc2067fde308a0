"""Checks of settings: what was given, what is allowed, and what to do about it."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KV_HEADS = ("auto", "expand", "skip")
TARGETS = ("head", "channel")
METHODS = ("rank", "average", "random")
ASSESSMENT_SETTINGS = ("method", "tokens", "interval")
IMPLEMENTATIONS = ("auto", "torch", "triton")


def check_choice(setting: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`, proposing the nearest name."""
    allowed = list(allowed)
    if value not in allowed:
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


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless 0 < threshold <= 0.5."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 < threshold <= 0.5:
        raise ValueError(
            f"threshold: got {threshold!r}, allowed: a number in (0, 0.5], the share of units on "
            "each side (paper: 0.125 for continued pre-training, 0.1875 for instruction tuning)"
        )


def check_positive(setting: str, value: Any, kind: type = int) -> None:
    """Raise ValueError unless `value` is a positive number of the kind (int or float)."""
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        raise ValueError(f"{setting}: got {value!r}, allowed: a positive {kind.__name__}")


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
    check_positive("assessment: interval", interval)
    if tokens is not None:
        check_positive("assessment: tokens", tokens)
    return method, tokens, interval
