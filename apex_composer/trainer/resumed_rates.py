"""A resumed run's learning rates: those of its own settings, and none but the same for the past."""

import math
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch.optim.lr_scheduler import LambdaLR

from apex_composer.trainer.optimizer_settings import alike, put_back, read_settings, set_base_rates
from apex_composer.trainer.resuming import check_stages
from apex_composer.trainer.run_checks import check_agreement
from apex_composer.trainer.stage_plan import StagePlan
from apex_composer.trainer.stages import plan_stages


def find_stagewise(state: State) -> Any:
    """The scheduler `stagewise` that a run has now, perhaps within another one, or None.

    Composer turns its schedulers into functions of torch's: it is known by answering to these.
    """
    rates = next((found for found in state.callbacks if isinstance(found, StageRates)), None)
    if rates is None:
        return None
    rates.scheduler = None
    _rates_now(state)
    return rates.scheduler


def lay_out_stages(stages: Any, state: State) -> StagePlan:
    """Where the stages of a run's algorithm end; the scheduler `stagewise` must have the same."""
    plan, scheduler = plan_stages(stages, state), find_stagewise(state)
    if scheduler is not None:
        check_agreement(scheduler.stage_plan(state), plan)
    return plan


def _rates_now(state: State) -> list[Any] | None:
    """What schedulers say for every param group; the last one counts, as in Composer."""
    rates = None
    for scheduler in state.schedulers:
        if isinstance(scheduler, LambdaLR):
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [base * factor(scheduler.last_epoch) for base, factor in pairs]
    return rates


class StageRates(Callback):
    """Keeps what the stages were trained at, and trains later ones at what the settings say.

    Composer restores the base learning rate of a checkpoint over the one in the settings, in
    silence; a new `lr` would have no effect. The scheduler `stagewise` adds this callback to every
    run. After loading it puts the run's own base rates back (and the optimizer's other settings,
    see `optimizer_settings.py`), and at the start of every fit it refuses differences for stages
    that have begun.

    Args:
        settings: `read_settings` of the optimizer, before a checkpoint is loaded.
        batch: where the run stands.

    Attributes:
        scheduler: the one that was called last.
    """

    def __init__(self, settings: list[dict[str, Any]], batch: int):
        self.scheduler: Any = None
        self._optimizer, self._late = settings, batch > 0
        self._lrs = [group["lr"] for group in settings]
        self._trained: list[dict[str, Any]] | None = None  # the checkpoint's `optimizer`
        self._rates: dict[str, Any] = {}  # of the checkpoint, then of this run's last fit

    @classmethod
    def join(cls, scheduler: Any, state: State) -> None:
        """Take note of the scheduler that was called; a run without such a callback gets one."""
        found = next((callback for callback in state.callbacks if isinstance(callback, cls)), None)
        if found is None:
            settings = read_settings(state.optimizers[0], state.model)
            found = cls(settings, state.timestamp.batch.value)
            state.callbacks.append(found)
        found.scheduler = scheduler

    def after_load(self, state: State, logger: Logger) -> None:
        """Put the settings' base rates and hyper-parameters back over those of a checkpoint."""
        put_back(state.optimizers[0], self._optimizer, self._trained)
        for group, lr in zip(state.optimizers[0].param_groups, self._lrs, strict=True):
            group["initial_lr"] = alike(group["lr"], lr)
        set_base_rates(state.optimizers[0], state.schedulers)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check; where the clock stands at 0, the first batch gets the first stage's rate.

        Composer's schedulers act after a batch, or before the clock is set back, so it would have
        one of the run before.
        """
        self.check_fit(state)
        if state.timestamp.batch == 0 and find_stagewise(state) is not None:
            groups = state.optimizers[0].param_groups
            for group, rate in zip(groups, _rates_now(state), strict=True):
                group["lr"] = rate

    def check_fit(self, state: State) -> None:
        """Compare the stages that have begun with those of the checkpoint, or of the fit before.

        Raises:
            ValueError: a stage that has begun would get another end, rate or warm-up, or nothing
                tells what it had.
        """
        scheduler, batch = find_stagewise(state), state.timestamp.batch.value
        if scheduler is None:
            return
        if self._late and batch > 0:
            raise ValueError(
                f"stagewise: it came with fit() at batch {batch}, and does not know the rates that "
                "the run has had so far. Allowed: to give it when the Trainer is built, before a "
                "checkpoint is loaded, or to begin anew with fit(reset_time=True)"
            )
        plan = scheduler.stage_plan(state)
        now = {
            "unit": plan.unit,
            "ends": list(plan.ends),
            "rates": [[lr * factor for lr in self._lrs] for factor in scheduler.lr_multipliers],
            "t_warmup": [str(warmup) for warmup in scheduler.t_warmup],
        }
        branching = any(getattr(algorithm, "branching", False) for algorithm in state.algorithms)
        if self._rates and not branching:
            _check_begun(self._rates, now, state)
        self._rates, self._late = now, False

    def state_dict(self) -> dict[str, Any]:
        """The stages' ends, rates and warm-ups, and the optimizer's settings, plain data."""
        return {**self._rates, "optimizer": self._optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's until the run's own are known."""
        self._trained = state.get("optimizer")
        self._rates = {name: value for name, value in state.items() if name != "optimizer"}


def _check_begun(saved: dict[str, Any], now: dict[str, Any], state: State) -> None:
    time = state.timestamp.get(saved["unit"]).value
    begun = sum(start < time for start in [0, *saved["ends"][:-1]])
    check_stages(_plan(saved), _plan(now), begun)
    for stage in range(begun):
        for name, setting in (("rates", "lr x lr_multipliers"), ("t_warmup", "t_warmup")):
            before, given = saved[name][stage], now[name][stage]
            if not _same(before, given):
                raise ValueError(
                    f"{setting}: stage {stage} has begun with {_shown(before)}, this run says "
                    f"{_shown(given)}. Stages that have begun cannot be changed: set it back and "
                    "change only later stages (their lr_multipliers). To go on from here with "
                    "other rates, use `apex-composer branch` or start a new run from the weights "
                    "(load_weights_only: true)"
                )


def _plan(rates: dict[str, Any]) -> StagePlan:
    """The stages, whose operators are no matter of rates."""
    return StagePlan(rates["unit"], tuple(rates["ends"]), (True,) * len(rates["ends"]))


def _same(saved: Any, given: Any) -> bool:
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(saved, given, strict=True))
    return saved == given


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(f"{rate:g}" for rate in value)
