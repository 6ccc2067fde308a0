"""A resumed run's learning rates: those of its own settings, and none but the same for the past."""

import math
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from apex_composer.trainer.optimizer_settings import alike, put_back, read_settings, set_base_rates


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
    """

    def __init__(self, settings: list[dict[str, Any]], batch: int):
        self._optimizer, self._late = settings, batch > 0
        self._scheduler: Any = None
        self._called = batch  # when `fit` has called it first
        self._lrs = [group["lr"] for group in settings]
        self._trained: list[dict[str, Any]] | None = None  # the checkpoint's `optimizer`
        self._saved: dict[str, Any] | None = None
        self._now: dict[str, Any] | None = None

    @classmethod
    def follow(cls, scheduler: Any, state: State) -> None:
        """Follow the scheduler, in a callback that is added to a run which has none.

        To be called whenever the scheduler is. Composer does so first when it builds the trainer,
        before a checkpoint is loaded over the settings' rates, or in `fit(schedulers=...)`.
        """
        callbacks = getattr(state, "callbacks", None)
        if callbacks is None:
            return
        batch = state.timestamp.batch.value
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is None:
            found = cls(read_settings(state.optimizers[0], state.model), batch)
            callbacks.append(found)
        found._scheduler, found._called = scheduler, batch

    def after_load(self, state: State, logger: Logger) -> None:
        """Put the settings' base rates and hyper-parameters back over those of a checkpoint."""
        put_back(state.optimizers[0], self._optimizer, self._trained)
        for group, lr in zip(state.optimizers[0].param_groups, self._lrs, strict=True):
            group["initial_lr"] = alike(group["lr"], lr)
        set_base_rates(state.optimizers[0], state.schedulers)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check; where the clock was set back to 0, the first batch gets the first stage's rate.

        Composer's schedulers act after a batch, or before the clock is set back, so it would have
        one of the run before.
        """
        self.check_fit(state)
        stepped = self._called > 0 or any(s.last_epoch > 0 for s in state.schedulers)
        if state.timestamp.batch == 0 and stepped:
            for group in state.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] * self._scheduler(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Forget the batch's own call of the scheduler."""
        self._called = 0

    def check_fit(self, state: State) -> None:
        """Compare the stages that have begun with those of the checkpoint, or of the fit before.

        Raises:
            ValueError: a stage that has begun would get another end, rate or warm-up, or nothing
                tells what it had.
        """
        batch = state.timestamp.batch.value
        if self._late and batch > 0:
            raise ValueError(
                f"stagewise: it came with fit() at batch {batch}, and does not know the rates that "
                "the run has had so far. Allowed: to give it when the Trainer is built, before a "
                "checkpoint is loaded, or to begin anew with fit(reset_time=True)"
            )
        plan = self._scheduler.stage_plan(state)
        now = {
            "unit": plan.unit.value,
            "ends": list(plan.ends),
            "rates": [
                [lr * multiplier for lr in self._lrs]
                for multiplier in self._scheduler.lr_multipliers
            ],
            "t_warmup": [str(warmup) for warmup in self._scheduler.t_warmup],
        }
        branching = any(getattr(algorithm, "branching", False) for algorithm in state.algorithms)
        before = self._saved or self._now
        if before is not None and not branching:
            _check_begun(before, now, state)
        self._now, self._saved, self._late = now, None, False

    def state_dict(self) -> dict[str, Any]:
        """The stages' ends, rates and warm-ups, and the optimizer's settings, plain data."""
        return {**(self._now or self._saved or {}), "optimizer": self._optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's until the run's own are known."""
        self._trained = state.get("optimizer")
        self._saved = {name: value for name, value in state.items() if name != "optimizer"} or None


def _check_begun(saved: dict[str, Any], now: dict[str, Any], state: State) -> None:
    time = state.timestamp.get(saved["unit"]).value
    starts = [0, *saved["ends"][:-1]]
    for stage in range(sum(start < time for start in starts)):
        for name, setting in (
            ("ends", "stages"),
            ("rates", "lr x lr_multipliers"),
            ("t_warmup", "t_warmup"),
        ):
            # Fewer stages than have begun: only the run's own check of its stages knows better.
            given = now[name][stage] if stage < len(now[name]) else "no such stage"
            if saved["unit"] != now["unit"] or not _same(saved[name][stage], given):
                raise ValueError(
                    f"{setting}: stage {stage} has begun with {_shown(saved, name, stage)}, this "
                    f"run says {_shown(now, name, stage)}. Stages that have begun cannot be "
                    "changed: set it back and change only later stages (their lr_multipliers). "
                    "To go on from here with other rates, use `apex-composer branch` or start a "
                    "new run from the weights (load_weights_only: true)"
                )


def _same(saved: Any, given: Any) -> bool:
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(saved, given, strict=True))
    return saved == given


def _shown(rates: dict[str, Any], name: str, stage: int) -> str:
    if stage >= len(rates[name]):
        return "no such stage"
    value = rates[name][stage]
    if name == "ends":
        return f"its end at {value}{rates['unit']}"
    return ", ".join(f"{rate:g}" for rate in value) if name == "rates" else str(value)
