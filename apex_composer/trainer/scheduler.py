"""The scheduler `stagewise`: a learning rate for each stage."""

from collections.abc import Sequence
from typing import Any

from apex_composer.extras import needing

with needing("StagewiseScheduler"):  # first: the modules below need it, too
    from composer.core import State
    from composer.optim import ComposerScheduler

from apex_composer.settings import check_finite, check_keys
from apex_composer.trainer.resumed_rates import StageRates
from apex_composer.trainer.stage_plan import StagePlan
from apex_composer.trainer.stages import convert, parse_duration, parse_stages, plan_stages

# The paper's learning rates 1e-4, 4e-5, 1e-5 over the first.
PAPER_MULTIPLIERS = (1.0, 0.4, 0.1)


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
        warmups = t_warmup if _is_list(t_warmup) else [t_warmup] * count
        for setting, values in (("lr_multipliers", lr_multipliers), ("t_warmup", warmups)):
            if not _is_list(values):
                raise ValueError(
                    f"{setting}: got {values!r}, allowed: a list with one value per stage"
                )
            if len(values) != count:
                raise ValueError(
                    f"{setting}: got {len(values)} values for {count} stages, allowed: one each"
                )
        self.lr_multipliers = [
            check_finite("lr_multipliers", value, "numbers of 0 or more", lowest=0.0)
            for value in lr_multipliers
        ]
        self.t_warmup = [parse_duration("t_warmup", warmup, zero=True) for warmup in warmups]

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """What Composer calls: `multiplier`, in a run that keeps what its stages are trained at.

        A run hears of its scheduler by this call only, the first time as the trainer is built
        and before a checkpoint is loaded: that is when a run without `StageRates` gets it.
        """
        if ssr != 1.0:
            raise ValueError(f"scale_schedule_ratio: got {ssr}, allowed with stagewise: 1.0")
        StageRates.join(self, state)
        return self.multiplier(state)

    def multiplier(self, state: State) -> float:
        """What the base learning rate is multiplied by at the state's time."""
        plan = self.stage_plan(state)
        stage = min(plan.ended(state.timestamp), len(plan.ends) - 1)
        warmup = convert(self.t_warmup[stage], state)
        multiplier = self.lr_multipliers[stage]
        if warmup.value == 0:
            return multiplier
        elapsed = state.timestamp.get(plan.unit).value - plan.starts()[stage]
        return multiplier * min(1.0, elapsed / warmup.value)

    def stage_plan(self, state: State) -> StagePlan:
        """Where this run's stages end.

        Raises:
            ValueError: stages or warm-ups do not fit the run.
        """
        plan = plan_stages(self.stages, state)
        for given, start, end in zip(self.t_warmup, plan.starts(), plan.ends, strict=True):
            warmup = convert(given, state)
            if warmup.value == 0:
                continue
            if warmup.unit.value != plan.unit:
                raise ValueError(
                    f"t_warmup: got {given}, but the stages are in {plan.unit}: give both in the "
                    "same unit"
                )
            if warmup.value > end - start:
                raise ValueError(
                    f"t_warmup: got {given}, allowed: no longer than its stage "
                    f"({end - start}{plan.unit})"
                )
        return plan


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
