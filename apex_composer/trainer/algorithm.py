"""APEX as a Composer Algorithm: from events to the Expander."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from apex_composer.extras import needing

with needing("APEX"):  # first: the modules below need it, too
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger

from apex_composer import settings
from apex_composer.expander import Expander
from apex_composer.model.find_sites import find_sites
from apex_composer.model.fused_swiglu import FUSED_SWIGLU, FusedSwiGLU
from apex_composer.model.sites import Site
from apex_composer.trainable.check import check_model
from apex_composer.trainable.shares import Share
from apex_composer.trainer import resuming
from apex_composer.trainer.batches import Layout, look_at, open_assessment
from apex_composer.trainer.closing import Closing, check_owner
from apex_composer.trainer.first_assessment import assess_first_stage, first_goal
from apex_composer.trainer.metrics import final_metrics, stage_metrics, step_metrics
from apex_composer.trainer.optimizer_settings import put_back, read_settings
from apex_composer.trainer.resumed_rates import StageRates, lay_out_stages
from apex_composer.trainer.run_checks import check_expansion, check_fit, check_run, device_of
from apex_composer.trainer.stage_plan import StagePlan
from apex_composer.trainer.stages import parse_stages
from apex_composer.trainer.trained_rows import TrainedRows, check_not_frozen, check_rows


class APEX(Algorithm):
    """Advantageous Parameter EXpansion training (arXiv 2505.24241) in stages.

    Events: FIT_START assesses and begins the first stage (or resumes one); forward passes of
    training collect scores, committed at BATCH_END; around the optimizer's step gradients are
    mapped and operators trained (`step_hooks.py`); at the end of a stage, at BATCH_END, the
    operators are fused and the next stage's units selected.

    A fit whose clock stands at 0 begins the run anew, with a warning if there was one before:
    `fit(reset_time=True)`, or a checkpoint with `load_ignore_keys: [state/timestamp]`. What was
    trained stays part of the weights; the first assessment, stage 0 and an empty history follow.
    The first batch has the last learning rate of the run before, as Composer's schedulers leave
    it, unless the scheduler is `stagewise`.

    An object belongs to one Trainer: given to a second one, it leaves the first. Another object
    on the same model or optimizer is refused until the first Trainer is closed.

    Args:
        threshold: share of units selected on each side, in (0, 0.5]. Default 0.125.
        stages: a number of equal stages, or a list of Composer time strings (ba, tok, sp, ep,
            dur) or mappings `{duration: 1000ba, expansion: false}` that add up to max_duration.
            Default 3.
        targets: which kinds of units are expanded: `head`, `channel`. Default both.
        kv_heads: `auto`, `expand` or `skip`, see `Expander`. Default `auto`.
        assessment: `method`: rank, average or random (default rank); `tokens`: how many tokens
            to assess before the first stage (default 1 % of the first stage, at least a batch);
            `interval`: collect scores in every k-th batch of a stage (default 1).
        expansion: False selects and reports without operators. Default True.
        operator_lr_scale: the operators' learning rate over the weights'. Default None: 1, with a
            warning where the optimizer's learning rates are not of Adam's size.
        implementation: `torch`, `triton` (the kernels), or `auto`: the kernels where they run.
            Default `auto`.
        trainable: `all`, `selected`, `half` or `disadvantageous`, see `Expander`. All but `all`
            train rows of weights, which may be bf16, by an AdamW of their own. Default `all`.
        trainable_share: trained parameters over all, see `Expander`. Default None; `half`: 0.52.
        fused_swiglu: True computes the Llama family's SwiGLU in one kernel, `auto` where the
            kernel runs, see `FusedSwiGLU`. Default `auto`.
        seed: an integer of 0 or more, for operators and random selections; default the run's.
        log_interval: batches between logged operator norms and step times. Default 10.
        branch: which checkpoint this run goes on from with other settings; written by
            `apex-composer branch`. Default: none.

    Raises:
        ValueError: for a setting out of range.
        TypeError: for an unknown setting.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.125,
        stages: Any = 3,
        targets: Sequence[str] = settings.TARGETS,
        kv_heads: str = "auto",
        assessment: Mapping[str, Any] | None = None,
        expansion: bool = True,
        operator_lr_scale: float | None = None,
        implementation: str = "auto",
        trainable: str = "all",
        trainable_share: float | None = None,
        fused_swiglu: bool | str = "auto",
        seed: int | None = None,
        log_interval: int = 10,
        branch: Mapping[str, Any] | None = None,
        **unknown: Any,
    ):
        known = [*signature(APEX).parameters][:-1]  # all but `unknown`
        settings.check_keys("apex", unknown, known)
        self.trainable_share = settings.check_trainable(trainable, trainable_share)
        self.threshold = settings.check_threshold(threshold, trainable)
        settings.check_choice("kv_heads", kv_heads, settings.KV_HEADS)
        settings.check_flag("expansion", expansion)
        scale = settings.check_lr_scale(operator_lr_scale)
        self.seed = None if seed is None else settings.check_not_negative("seed", seed)
        self.log_interval = settings.check_positive("log_interval", log_interval)
        settings.check_choice("implementation", implementation, settings.IMPLEMENTATIONS)
        settings.check_choice("fused_swiglu", fused_swiglu, FUSED_SWIGLU)
        self.kv_heads, self.operator_lr_scale, self.fused_swiglu = kv_heads, scale, fused_swiglu
        self.expansion = expansion and trainable != "disadvantageous"
        self.implementation, self.trainable = implementation, trainable
        self.stages, self.targets = parse_stages(stages), settings.check_targets(targets)
        assessment = {} if assessment is None else assessment
        self.method, self.tokens, self.interval = settings.check_assessment(assessment)
        self.share: Share | None = None  # what is trained, where that is not everything
        self.lineage: list[dict[str, Any]] = []
        self.branching = False  # this start leaves its checkpoint's settings
        self._branch = resuming.check_branch(branch)
        self._expander: Expander | None = None
        self._swiglu: FusedSwiGLU | None = None
        self._closing: Closing | None = None
        self._plan: StagePlan | None = None
        self._loaded: dict[str, Any] | None = None
        self._optimizer: list[dict[str, Any]] = []  # the settings' hyper-parameters
        self._layout: Layout | None = None  # of the batch

    def __repr__(self) -> str:
        names = ("threshold", "stages", "targets", "kv_heads", "method", "expansion", "trainable")
        return f"APEX({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stages so far, see `stage_record`."""
        return self._expander.history if self._expander is not None else []

    @property
    def expander(self) -> Expander | None:
        """Of this run; None before its first fit."""
        return self._expander

    def match(self, event: Event, state: State) -> bool:
        """Run on the events that have a method here: `_on_batch_end` for BATCH_END."""
        return hasattr(self, f"_on_{event.value}")

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do the event's part."""
        if event not in (Event.INIT, Event.AFTER_LOAD):
            check_owner(self._closing, state)
        getattr(self, f"_on_{event.value}")(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The Expander's state, the stages and the optimizer's settings, plain data only."""
        own: dict[str, Any] = super().state_dict()
        apex = self._loaded
        if apex is None and self._expander is not None:
            stages = {"stages": self._plan.state_dict(), "targets": list(self.targets)}
            apex = {**self._expander.state_dict(), **stages, "lineage": self.lineage}
        more = {"optimizer": self._optimizer, "changeable": resuming.changeable(self)}
        return own if apex is None else {**own, "apex": {**apex, **more}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's state until FIT_START, when the run's clock is restored too."""
        self._loaded = state.get("apex")
        resuming.check_trained(self._loaded, self.trainable)
        resuming.tell_changed(self._loaded, self)

    def _on_init(self, state: State, logger: Logger) -> None:
        """Refuse, before data and weights are loaded, what could only fail later; freeze."""
        check_run(state, self._expander)
        if self._closing is not None:
            self._closing.hand_over()  # an earlier trainer's run
        self._expander = self._plan = self._loaded = None
        check_not_frozen(state)
        sites = self.find_sites(state.model)
        found = check_model(sites, **self._settings(), device=device_of(state))
        if self.expansion or found.share is not None:
            own = found.trained or found.sites
            check_expansion(state, own, self.implementation if self.expansion else "auto")
        check_rows(state, found)
        self.share = found.share
        self._optimizer = read_settings(state.optimizers[0], state.model)
        self._swiglu = FusedSwiGLU(
            state.model, self.fused_swiglu, device=device_of(state), collector=self._reserve_norms
        )
        rows = None
        if found.share is not None:
            logger.log_hyperparameters({"apex/trained": found.share.describe()})
            rows = TrainedRows(state, found, lambda: self._expander.training)
        self._closing = Closing(self._swiglu, state, rows)

    def _on_before_load(self, state: State, logger: Logger) -> None:
        """Refuse stages that do not fill the run as soon as its length can be known."""
        if state.max_duration is not None and state.train_dataloader is not None:
            lay_out_stages(self.stages, state)
        self._closing.step_aside(state)  # until it is loaded

    def _on_after_load(self, state: State, logger: Logger) -> None:
        """See where the run comes from, and put changed settings of the optimizer back."""
        self._closing.come_back(state)
        batch = state.timestamp.batch.value
        self.lineage, self.branching = resuming.trace(self._branch, self._loaded, batch)
        if not any(isinstance(callback, StageRates) for callback in state.callbacks):
            trained = (self._loaded or {}).get("optimizer")
            put_back(state.optimizers[0], self._optimizer, trained, state.schedulers)

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        """A fresh, a resumed or a further fit; with the clock at 0, the start of a run."""
        check_run(state, self._expander)
        self._swiglu.log_compiled(state.model)
        plan, batch = lay_out_stages(self.stages, state), state.timestamp.batch.value
        running = self._expander is not None and self._expander.stage >= 0
        if running and batch > 0:
            resuming.check_further(self._plan, plan, self.history, batch)
            return
        if batch == 0 and (running or (self._loaded or {"stage": -1})["stage"] >= 0):
            resuming.warn_anew()
            self._loaded, self.branching = None, False
        self._closing.end_stages()
        self._plan = plan
        self._expander = self._build(state)
        self._closing.attach(self._expander, state.optimizers[0])
        if not resuming.restore(
            self._expander, self._loaded, plan, self.targets, state.timestamp, self.branching
        ):
            check_fit(state)
            if self.method != "random":
                goal = first_goal(self.tokens, plan)
                assess_first_stage(state, self._expander.assessment, goal)
            self._begin_stage(plan.ended(state.timestamp), state, logger)
        # The checkpoint of a finished run: its last stage is over, this run's next one begins.
        self._pass_boundary(state, logger)
        self._loaded = None

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        self._expander.stopwatch.running = (batch + 1) % self.log_interval == 0

    def _on_before_train_batch(self, state: State, logger: Logger) -> None:
        """Within the step's closure; again when a batch is tried anew after an OOM."""
        self._expander.ensure_folded()
        if self._expander.training is not None:
            self._expander.training.zero_grad()
        self._expander.attachment.armed = True
        self._expander.assessment.discard()
        self._layout = look_at(state.batch)

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        # Counted from the stage's start, so that every stage has scores whatever the interval.
        start = self.history[-1]["start_batch"]
        if (state.timestamp.batch.value - start) % self.interval == 0:
            open_assessment(self._expander.assessment, state.batch, self._layout)

    def _on_after_forward(self, state: State, logger: Logger) -> None:
        self._expander.assessment.close()

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        """The clock has advanced: commit scores, log, and pass a stage's boundary."""
        self._expander.assessment.commit()
        if self._expander.stopwatch.running:
            logger.log_metrics(step_metrics(self._expander))
        ended, stages = self._plan.ended(state.timestamp), len(self._plan.ends)
        if ended == stages > self._plan.ended(state.previous_timestamp):
            logger.log_metrics(final_metrics(self._expander))
            self._expander.fuse()
        self._pass_boundary(state, logger)

    def _pass_boundary(self, state: State, logger: Logger) -> None:
        ended = self._plan.ended(state.timestamp)
        if self._expander.stage < ended < len(self._plan.ends):
            self._begin_stage(ended, state, logger)

    def _begin_stage(self, stage: int, state: State, logger: Logger) -> None:
        expansion, batch = self._plan.expansion[stage] and self.expansion, state.timestamp.batch
        self._expander.begin_stage(expansion, stage=stage, batch=batch.value)
        logger.log_metrics(stage_metrics(self._expander))

    def _build(self, state: State) -> Expander:
        return Expander(
            self.find_sites(state.model),
            seed=state.rank_zero_seed if self.seed is None else self.seed,
            method=self.method,
            operator_lr_scale=self.operator_lr_scale,
            device=device_of(state),
            **self._settings(),
        )

    def find_sites(self, model: nn.Module) -> list[Site]:
        """The weights of a model that it acts on."""
        return find_sites(model, self.targets)

    def _settings(self) -> dict[str, Any]:
        """Those that say what of a model is expanded and trained."""
        names = ("threshold", "kv_heads", "expansion", "implementation")
        return {name: getattr(self, name) for name in (*names, "trainable", "trainable_share")}

    def _reserve_norms(self, group: str, gate: Tensor) -> tuple[Tensor, Tensor | None] | None:
        return self._expander and self._expander.assessment.reserve_norms(group, gate)
