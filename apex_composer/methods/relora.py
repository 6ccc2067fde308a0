"""ReLoRA: low-rank adapters that are merged into the base and begun anew every so often."""

from typing import Any

from apex_composer.extras import needing

with needing("ReLoRA"):  # first: the modules below need it, too
    from composer.core import Algorithm, Event, State, Time, TimeUnit
    from composer.loggers import Logger

from apex_composer import settings
from apex_composer.methods.lora_restart import check_mergeable, restart
from apex_composer.methods.method_checks import check_known, check_resumed
from apex_composer.methods.relora_checks import check_run
from apex_composer.trainer.stages import convert, parse_duration


class ReLoRA(Algorithm):
    """Merges LoRA into the base every `interval` and begins it anew (arXiv 2307.05695).

    W <- W + s B A, then A ~ kaiming, B = 0, in every adapter of peft. With it the optimizer's
    moments of the `prune` smallest elements of A and B become 0, and for `t_warmup` batches all
    learning rates are multiplied by 1 / t_warmup, 2 / t_warmup, ... 1 (from 1 / t_warmup instead of
    0: our choice). The step count goes on, as in the authors' code, so that Adam's first steps
    after a restart are several times as long as usual: t_warmup is there for them.

    Smallest is said of the first moment, and the second one of the same elements is pruned: our
    choice. Each by its own magnitudes, as in the authors' code, leaves first moments over second
    ones of 0, and A, whose gradient is 0 as long as B is, takes steps of m / eps: runs diverge.

    The model has peft's modules, by llm-foundry's `model.peft_config`, and its function does not
    change by a restart but for rounding. What happens follows from the batch that a run is at;
    checkpoints hold the settings, in batches, and a run that goes on with others is refused
    (`dur` of a longer run is one). A restart falls on the last batch too, where the run ends with a
    whole interval: a longer run goes on from there as if it had been one.

    Args:
        interval: batches between restarts, as a Composer time string in ba, ep or dur.
            Default `500ba` (our choice; the paper's 5000 are for runs of 20000).
        t_warmup: batches in which the learning rates rise again, shorter than `interval`; 0ba for
            none. Default `50ba` (the paper: 50 to 100).
        prune: share of the elements whose moments become 0, in [0, 1]. Default 0.9, as in
            commands of the authors' repository (Guitaricet/relora).
        seed: of the new A, an integer of 0 or more. Default: the run's.

    Raises:
        ValueError: for a setting out of range; a resumed run's, for another one.
        TypeError: for an unknown setting.
    """

    def __init__(
        self,
        *,
        interval: str | Time = "500ba",
        t_warmup: str | Time = "50ba",
        prune: float = 0.9,
        seed: int | None = None,
        **unknown: Any,
    ):
        check_known("relora", unknown, ReLoRA)
        self.interval = parse_duration("relora: interval", interval)
        self.t_warmup = parse_duration("relora: t_warmup", t_warmup, zero=True)
        if not settings.is_number(prune) or not 0 <= prune <= 1:
            raise ValueError(f"relora: prune: got {prune!r}, allowed: a share from 0 to 1")
        self.prune = float(prune)
        self.seed = None if seed is None else settings.check_not_negative("relora: seed", seed)
        self._batches = self._warmup = 0
        # The optimizer's groups with the scheduler's own rates, while lower ones are in use.
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._hook: Any = None
        self._loaded: dict[str, Any] | None = None  # the settings so far

    def match(self, event: Event, state: State) -> bool:
        """Run on the events that have a method here: `_on_batch_end` for BATCH_END."""
        return hasattr(self, f"_on_{event.value}")

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do the event's part."""
        getattr(self, f"_on_{event.value}")(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The settings, in batches."""
        return {**super().state_dict(), "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's settings until the run's length is known."""
        self._loaded = state["settings"]

    def _settings(self) -> dict[str, Any]:
        times = {"interval": f"{self._batches}ba", "t_warmup": f"{self._warmup}ba"}
        return {**times, "prune": self.prune}

    def _on_init(self, state: State, logger: Logger) -> None:
        check_mergeable(state.model)
        check_run(state)

    def _on_before_load(self, state: State, logger: Logger) -> None:
        """Refuse times that do not fit the run as soon as its length can be known."""
        if state.max_duration is not None and state.train_dataloader is not None:
            self._lay_out(state)

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        self._lay_out(state)
        if self._loaded is not None and state.timestamp.batch.value:
            check_resumed("relora", self._loaded, self._settings())
        self._loaded = self._settings()  # a further fit, too, may make other batches of a `dur`
        if self._hook is not None:
            self._hook.remove()
        self._hook = state.optimizers[0].register_step_post_hook(lambda *_: self._put_back())

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        self._warm_up(state)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        """The clock has advanced: begin anew, and show the next batch's rates to `lr_monitor`."""
        batch = state.timestamp.batch.value
        if batch % self._batches == 0:
            seed = state.rank_zero_seed if self.seed is None else self.seed
            zeroed = restart(state.model, state.optimizers[0], self.prune, seed, batch)
            logger.log_metrics({"relora/restarts": batch // self._batches, "relora/zeroed": zeroed})
        self._warm_up(state)

    def _on_eval_before_all(self, state: State, logger: Logger) -> None:
        """Before evaluations, in which `preemption` may save, and before checkpoints."""
        self._put_back()

    _on_batch_checkpoint = _on_eval_before_all

    def _lay_out(self, state: State) -> None:
        """The settings in batches, checked against each other and the run."""
        self._batches = _in_batches("interval", self.interval, state)
        self._warmup = _in_batches("t_warmup", self.t_warmup, state)
        if self._warmup >= self._batches:
            raise ValueError(
                f"relora: t_warmup: got {self.t_warmup}, allowed: less than the interval, which is "
                f"{self._batches}ba"
            )
        total = convert(state.max_duration, state)
        if total.unit == TimeUnit.BATCH and self._batches >= total.value:
            raise ValueError(
                f"relora: interval: got {self.interval}, allowed: less than the run's "
                f"{total.value}ba. Without a restart it is LoRA: remove relora from `algorithms`"
            )

    def _warm_up(self, state: State) -> None:
        """Lower the learning rates for the batch that comes next, until its step is done."""
        self._put_back()
        batch = state.timestamp.batch.value
        done = batch % self._batches
        if batch >= self._batches and done + 1 < self._warmup:
            groups = state.optimizers[0].param_groups
            self._rates = [(group, group["lr"]) for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * ((done + 1) / self._warmup)

    def _put_back(self) -> None:
        """Schedulers and checkpoints find the rates that the scheduler has set."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []


def _in_batches(setting: str, time: Time, state: State) -> int:
    converted = convert(time, state)
    if converted.unit != TimeUnit.BATCH:
        raise ValueError(
            f"relora: {setting}: got {time} in a run of {state.max_duration}, allowed: ba, ep, or "
            "dur of a run whose max_duration is in ba or ep"
        )
    return int(converted.value)
