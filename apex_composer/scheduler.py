"""Stages as spans of Composer time, and the learning rate that goes with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import ComposerScheduler

from apex_composer.settings import check_finite, check_flag, check_keys, check_positive
from apex_composer.stage_rates import StageRates

# The paper's learning rates 1e-4, 4e-5, 1e-5 over the first.
PAPER_MULTIPLIERS = (1.0, 0.4, 0.1)
_UNITS = (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH, TimeUnit.DURATION)
# Thirds are written as 0.33dur.
_SHARES_TOLERANCE = 0.0100001
_EXAMPLES = "for example 3, [10000ba, 10000ba] or [0.5dur, {duration: 0.5dur, expansion: false}]"


@dataclass(frozen=True)
class Stage:
    """A stage as the settings give it: how long, and whether it trains operators."""

    duration: Time
    expansion: bool = True


@dataclass(frozen=True)
class StagePlan:
    """Where the stages of a run end, in one unit of time.

    Attributes:
        unit: batches, tokens or samples.
        ends: of every stage, counted from the start of training, ascending.
        expansion: whether the stage trains operators.
    """

    unit: TimeUnit
    ends: tuple[int, ...]
    expansion: tuple[bool, ...]

    def ended(self, timestamp: Timestamp) -> int:
        """How many stages are over; the index of the current one unless all are."""
        now = timestamp.get(self.unit).value
        return sum(now >= end for end in self.ends)

    def starts(self) -> tuple[int, ...]:
        """Where the stages begin."""
        return (0, *self.ends[:-1])

    def describe(self) -> list[str]:
        """The stages' ends as Composer time strings, plain ones marked."""
        plain = ("", " (plain)")
        return [
            f"{end}{self.unit.value}{plain[not expansion]}"
            for end, expansion in zip(self.ends, self.expansion, strict=True)
        ]


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
        value: for example `1000ba`.
        zero: whether 0 is allowed.

    Raises:
        ValueError: if it is no such string.
    """
    try:
        time = value if isinstance(value, Time) else Time.from_timestring(value)
        good = time.unit in _UNITS and math.isfinite(time.value)
        good = good and (time.value > 0 or (zero and time.value == 0))
    except (ValueError, TypeError, OverflowError):
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
        stages: of `parse_stages`.
        state: Composer's, with max_duration set (and a sized dataloader for epochs).

    Raises:
        ValueError: if the stages do not fill the run exactly.
    """
    total = convert(state.max_duration, state)
    if total.unit not in _UNITS:
        raise ValueError(
            f"max_duration: got {state.max_duration}, allowed with apex: ba, sp, tok, ep"
        )
    if isinstance(stages, int):
        ends = [total.value * (i + 1) // stages for i in range(stages)]
        plan = StagePlan(total.unit, tuple(ends), (True,) * stages)
    else:
        lengths = [convert(stage.duration, state, exact=True) for stage in stages]
        for stage, length in zip(stages, lengths, strict=True):
            _check_unit(stage.duration, length, total, state)
        sums = accumulate(length.value for length in lengths)
        ends = [math.floor(end + 0.5) for end in sums]
        plan = StagePlan(total.unit, tuple(ends), tuple(stage.expansion for stage in stages))
    _check_plan(plan, total, state)
    return plan


def convert(time: Time, state: State, *, exact: bool = False) -> Time:
    """Epochs to batches, a share of training (dur) to the unit of max_duration.

    Args:
        time: to convert.
        state: Composer's.
        exact: keep fractions, for sums that are rounded only once.
    """
    if time.unit == TimeUnit.DURATION:
        total = convert(state.max_duration, state)
        value = float(time.value) * total.value
        return _Length(value, total.unit) if exact else Time(round(value), total.unit)
    if time.unit == TimeUnit.EPOCH:
        if state.dataloader_len is None:
            raise ValueError(
                f"max_duration, stages, t_warmup: {time} cannot be laid out in batches, the "
                "dataloader has no length: give all of them in ba, sp or tok"
            )
        return Time(time.value * int(state.dataloader_len), TimeUnit.BATCH)
    return time


@dataclass(frozen=True)
class _Length:
    """A duration that may have a fraction, which Composer's Time does not allow for batches."""

    value: float
    unit: TimeUnit


def _check_unit(given: Time, length: Time | _Length, total: Time, state: State) -> None:
    if length.unit != total.unit:
        raise ValueError(
            f"stages: got {given}, but max_duration is {state.max_duration}: give both in the "
            "same unit, or the stages as shares of training (dur)"
        )


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


class StagewiseScheduler(ComposerScheduler):
    """A learning rate per stage: lr(t) = lr * lr_multipliers[stage(t)] * warmup(t).

    Composer steps schedulers before its clock advances, so the first two batches of a run share
    lr(0), and a stage's learning rate arrives one batch after the stage's first one.

    Args:
        stages: as for the algorithm `apex`; a difference to it is an error at the start.
            Default 3.
        lr_multipliers: one per stage, default (1, 0.4, 0.1): the paper's 1e-4, 4e-5, 1e-5.
        t_warmup: the span at each stage's start in which the learning rate rises linearly from
            0; a Composer time string, or one per stage. Default `0ba`.

    Raises:
        ValueError: for settings out of range.
        TypeError: for unknown settings.
    """

    def __init__(
        self,
        stages: Any = 3,
        lr_multipliers: Sequence[float] = PAPER_MULTIPLIERS,
        t_warmup: str | Sequence[str] = "0ba",
        **unknown: Any,
    ):
        check_keys("stagewise", unknown, ("stages", "lr_multipliers", "t_warmup"))
        self.stages = parse_stages(stages)
        count = self.stages if isinstance(self.stages, int) else len(self.stages)
        self.lr_multipliers = [_multiplier(m) for m in _one_each("lr_multipliers", lr_multipliers)]
        warmups = _one_each("t_warmup", t_warmup) if _is_list(t_warmup) else [t_warmup] * count
        self.t_warmup = [parse_duration("t_warmup", warmup, zero=True) for warmup in warmups]
        for setting, values in (("lr_multipliers", self.lr_multipliers), ("t_warmup", warmups)):
            if len(values) != count:
                raise ValueError(
                    f"{setting}: got {len(values)} values for {count} stages, allowed: one each"
                )
        self._planned: tuple[Any, StagePlan] | None = None

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier of the learning rate at the state's time."""
        if ssr != 1.0:
            raise ValueError(f"scale_schedule_ratio: got {ssr}, allowed with stagewise: 1.0")
        StageRates.follow(self, state)
        plan = self.stage_plan(state)
        stage = min(plan.ended(state.timestamp), len(plan.ends) - 1)
        warmup = convert(self.t_warmup[stage], state)
        multiplier = self.lr_multipliers[stage]
        if warmup.value == 0:
            return multiplier
        elapsed = state.timestamp.get(plan.unit).value - plan.starts()[stage]
        return multiplier * min(1.0, elapsed / warmup.value)

    def stage_plan(self, state: State) -> StagePlan:
        """The stages of this run, compared with those of the algorithm when first laid out."""
        key = (state.max_duration, state.dataloader_len)
        if self._planned is None or self._planned[0] != key:
            plan = plan_stages(self.stages, state)
            for algorithm in state.algorithms:
                other = getattr(algorithm, "stage_plan", None)
                if other is not None and other(state).ends != plan.ends:
                    raise ValueError(
                        f"stages: the scheduler stagewise ends them at {plan.describe()}, the "
                        f"algorithm apex at {other(state).describe()}: give both the same stages"
                    )
            self._check_warmups(plan, state)
            self._planned = (key, plan)
        return self._planned[1]

    def _check_warmups(self, plan: StagePlan, state: State) -> None:
        for given, start, end in zip(self.t_warmup, plan.starts(), plan.ends, strict=True):
            warmup = convert(given, state)
            if warmup.value == 0:
                continue
            if warmup.unit != plan.unit:
                raise ValueError(
                    f"t_warmup: got {given}, but the stages are in {plan.unit.value}: give both "
                    "in the same unit"
                )
            if warmup.value > end - start:
                raise ValueError(
                    f"t_warmup: got {given}, allowed: no longer than its stage "
                    f"({end - start}{plan.unit.value})"
                )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _one_each(setting: str, values: Any) -> list[Any]:
    if not _is_list(values):
        raise ValueError(f"{setting}: got {values!r}, allowed: a list with one value per stage")
    return list(values)


def _multiplier(value: Any) -> float:
    return check_finite("lr_multipliers", value, "numbers of 0 or more", lowest=0.0)
