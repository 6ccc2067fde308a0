"""The setting `stages`: spans of Composer time, laid over a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

from composer.core import State, Time, TimeUnit

from apex_composer.settings import check_flag, check_keys, check_positive
from apex_composer.trainer.stage_plan import StagePlan

_UNITS = (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH, TimeUnit.DURATION)
# Thirds are written as 0.33dur.
_SHARES_TOLERANCE = 0.0100001
_EXAMPLES = "for example 3, [10000ba, 10000ba] or [0.5dur, {duration: 0.5dur, expansion: false}]"


@dataclass(frozen=True)
class Stage:
    """A stage as the settings give it: how long, and whether it trains operators."""

    duration: Time
    expansion: bool = True


def parse_stages(stages: Any) -> int | tuple[Stage, ...]:
    """Check the `stages` setting as far as it can be checked before the run is known.

    Args:
        stages: a number of equal stages, or a list of Composer time strings (ba, tok, sp, ep,
            dur) or of mappings `{duration: 1000ba, expansion: false}`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(stages, Integral) and not isinstance(stages, bool):
        return check_positive("stages", stages)
    if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence) or not len(stages):
        raise ValueError(
            f"stages: got {stages!r}, allowed: a number or a list of durations, {_EXAMPLES}"
        )
    parsed = tuple(_parse_stage(stage) for stage in stages)
    _check_shares(parsed)
    return parsed


def _check_shares(stages: tuple[Stage, ...]) -> None:
    """Refuse shares of training that cannot be meant to add up to the whole.

    To the last unit of time it is checked when the run's length is known (`_check_plan`).
    """
    shares = [s.duration.value for s in stages if s.duration.unit == TimeUnit.DURATION]
    total, complete = sum(shares), len(shares) == len(stages)
    if total > 1 + _SHARES_TOLERANCE or (complete and total < 1 - _SHARES_TOLERANCE):
        raise ValueError(
            f"stages: the shares of training add up to {total:g}dur, allowed: 1dur together with "
            f"the other stages, {_EXAMPLES}"
        )


def _parse_stage(stage: Any) -> Stage:
    if isinstance(stage, Mapping):
        check_keys("stages", stage, ("duration", "expansion"))
        expansion = stage.get("expansion", True)
        check_flag("stages: expansion", expansion)
        return Stage(parse_duration("stages", stage.get("duration")), expansion)
    return Stage(parse_duration("stages", stage))


def parse_duration(setting: str, value: Any, *, zero: bool = False) -> Time:
    """A Composer time string of a unit that stages know.

    Args:
        setting: named in the error.
        value: the string, for example `1000ba`.
        zero: whether 0 is allowed.

    Raises:
        ValueError: if it is no such string.
    """
    try:
        time = value if isinstance(value, Time) else Time.from_timestring(value)
        good = time.unit in _UNITS and math.isfinite(time.value)
        good = good and (time.value > 0 or (zero and time.value == 0))
    except (ValueError, TypeError, OverflowError, RuntimeError):  # the last for tensors
        good = False
    if not good:
        units = ", ".join(unit.value for unit in _UNITS)
        raise ValueError(
            f"{setting}: got {value!r}, allowed: a Composer time string in {units}, for example "
            "'1000ba' or '0.5dur'"
        )
    return time


def plan_stages(stages: int | tuple[Stage, ...], state: State) -> StagePlan:
    """Lay the stages over the run.

    Args:
        stages: what `parse_stages` returns.
        state: Composer's, with max_duration set (and a sized dataloader for epochs).

    Raises:
        ValueError: if the stages do not fill the run exactly.
    """
    if state.max_duration is None:
        raise ValueError(
            "max_duration: not given, but stages are laid over it: give it when the trainer is "
            "built, not to fit() only"
        )
    total = convert(state.max_duration, state)
    if total.unit not in _UNITS:
        raise ValueError(
            f"max_duration: got {state.max_duration}, allowed with apex: ba, sp, tok, ep"
        )
    if isinstance(stages, int):
        ends = [total.value * (i + 1) // stages for i in range(stages)]
        expansion = (True,) * stages
    else:
        sums = accumulate(_length(stage.duration, total, state) for stage in stages)
        ends = [math.floor(end + 0.5) for end in sums]
        expansion = tuple(stage.expansion for stage in stages)
    plan = StagePlan(total.unit.value, tuple(ends), expansion)
    _check_plan(plan, total, state)
    return plan


def convert(time: Time, state: State) -> Time:
    """Epochs to batches, a share of training (dur) to the unit of max_duration.

    Raises:
        ValueError: for epochs of a dataloader without a length.
    """
    if time.unit == TimeUnit.DURATION:
        total = convert(state.max_duration, state)
        return Time(round(float(time.value) * total.value), total.unit)
    if time.unit == TimeUnit.EPOCH:
        if state.dataloader_len is None:
            raise ValueError(
                f"max_duration, stages, t_warmup, t_decay, t_cycle: {time} cannot be laid out in "
                "batches, the dataloader has no length: give all of them in ba, sp or tok"
            )
        return Time(time.value * int(state.dataloader_len), TimeUnit.BATCH)
    return time


def _length(duration: Time, total: Time, state: State) -> float:
    """In the run's unit; shares keep their fractions, so that only their sums are rounded."""
    if duration.unit == TimeUnit.DURATION:
        return float(duration.value) * total.value
    length = convert(duration, state)
    if length.unit != total.unit:
        raise ValueError(
            f"stages: got {duration}, but max_duration is {state.max_duration}: give both in the "
            "same unit, or the stages as shares of training (dur)"
        )
    return length.value


def _check_plan(plan: StagePlan, total: Time, state: State) -> None:
    if any(end <= start for start, end in zip(plan.starts(), plan.ends, strict=True)):
        raise ValueError(
            f"stages: {plan.describe()} has an empty stage, max_duration is {state.max_duration}: "
            "use fewer stages or train longer"
        )
    if plan.ends[-1] != total.value:
        relation = "longer" if plan.ends[-1] > total.value else "shorter"
        raise ValueError(
            f"stages: they end at {plan.describe()}, which is {relation} than training "
            f"(max_duration {state.max_duration} = {total.value}{total.unit.value}): make them "
            "add up. Training without operators is a stage too: "
            "{duration: 1000ba, expansion: false}"
        )
