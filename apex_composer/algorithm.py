"""APEX as a Composer Algorithm: from events to the Expander."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from torch import Tensor

from apex_composer.attachment import Attachment
from apex_composer.expander import Expander
from apex_composer.first_assessment import (
    AssessmentGoal,
    assess_training_data,
    attention_mask,
)
from apex_composer.forward_passes import forward_microbatches, unwrapped
from apex_composer.fused_swiglu import FUSED_SWIGLU, FusedSwiGLU
from apex_composer.metrics import final_metrics, stage_metrics, step_metrics
from apex_composer.resuming import (
    check_branch,
    check_stages,
    keeps_the_stage,
    trace,
    trained_records,
)
from apex_composer.run_checks import check_implementation, check_run
from apex_composer.scheduler import StagePlan, parse_stages, plan_stages
from apex_composer.settings import (
    IMPLEMENTATIONS,
    KV_HEADS,
    TARGETS,
    check_assessment,
    check_choice,
    check_flag,
    check_keys,
    check_positive,
    check_same,
    check_targets,
    check_threshold,
)
from apex_composer.sites import find_sites

SETTINGS = (
    "threshold",
    "stages",
    "targets",
    "kv_heads",
    "assessment",
    "expansion",
    "operator_lr_scale",
    "implementation",
    "fused_swiglu",
    "seed",
    "log_interval",
    "branch",
)
# The paper assesses on 30 M tokens before stages of about 3 B.
DEFAULT_ASSESSED_SHARE = 0.01


class APEX(Algorithm):
    """Advantageous Parameter EXpansion training (arXiv 2505.24241) in stages.

    Events: FIT_START assesses and begins the first stage (or resumes one); forward passes of
    training collect scores, committed at BATCH_END; around the optimizer's step gradients are
    mapped and operators trained (`attachment.py`); at the end of a stage, at BATCH_END, the
    operators are fused and the next stage's units selected.

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
        operator_lr_scale: the operators' learning rate over the weights'. Default 1.
        implementation: `torch`, `triton` (the kernels), or `auto`: the kernels where they run.
            Default `auto`.
        fused_swiglu: True computes the Llama family's SwiGLU in one kernel, `auto` where the
            kernel runs, see `FusedSwiGLU`. Default `auto`.
        seed: of operators and random selections; default the run's seed.
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
        targets: Sequence[str] = TARGETS,
        kv_heads: str = "auto",
        assessment: Mapping[str, Any] | None = None,
        expansion: bool = True,
        operator_lr_scale: float = 1.0,
        implementation: str = "auto",
        fused_swiglu: bool | str = "auto",
        seed: int | None = None,
        log_interval: int = 10,
        branch: Mapping[str, Any] | None = None,
        **unknown: Any,
    ):
        check_keys("apex", unknown, SETTINGS)
        check_threshold(threshold)
        check_choice("kv_heads", kv_heads, KV_HEADS)
        check_flag("expansion", expansion)
        check_positive("operator_lr_scale", operator_lr_scale, float)
        check_positive("log_interval", log_interval)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        check_choice("fused_swiglu", fused_swiglu, FUSED_SWIGLU)
        self.threshold, self.kv_heads, self.expansion = threshold, kv_heads, expansion
        self.operator_lr_scale, self.seed, self.log_interval = operator_lr_scale, seed, log_interval
        self.implementation, self.fused_swiglu = implementation, fused_swiglu
        self.stages = parse_stages(stages)
        self.targets = check_targets(targets)
        self.method, self.tokens, self.interval = check_assessment(assessment or {})
        self.lineage: list[dict[str, Any]] = []
        self.branching = False  # this start leaves its checkpoint's settings
        self._branch = check_branch(branch)
        self._expander: Expander | None = None
        self._attachment: Attachment | None = None
        self._swiglu: FusedSwiGLU | None = None
        self._plan: StagePlan | None = None
        self._loaded: dict[str, Any] | None = None
        self._padded = True
        self._events = {
            Event.INIT: self._check_run,
            Event.FIT_START: self._start,
            Event.BATCH_START: self._arm,
            Event.BEFORE_TRAIN_BATCH: self._begin_batch,
            Event.BEFORE_FORWARD: self._open,
            Event.AFTER_FORWARD: self._close,
            Event.BATCH_END: self._end_batch,
        }

    def __repr__(self) -> str:
        settings = ("threshold", "stages", "targets", "kv_heads", "method", "expansion")
        return f"APEX({', '.join(f'{name}={getattr(self, name)!r}' for name in settings)})"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stages so far, see `history.stage_record`."""
        return self._expander.history if self._expander is not None else []

    def stage_plan(self, state: State) -> StagePlan:
        """Where this run's stages end; the scheduler `stagewise` compares its own with it."""
        return plan_stages(self.stages, state)

    def match(self, event: Event, state: State) -> bool:
        """Run on the events that APEX is made of."""
        return event in self._events

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do the event's part."""
        self._events[event](state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The Expander's state and the stages, plain data only."""
        own: dict[str, Any] = super().state_dict()
        if self._loaded is not None:
            own["apex"] = self._loaded
        elif self._expander is not None:
            own["apex"] = {
                **self._expander.state_dict(),
                "stages": self._plan.describe(),
                "targets": list(self.targets),
                "lineage": self.lineage,
            }
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's state until FIT_START, when the run's clock is restored too."""
        self._loaded = state.get("apex")

    def _check_run(self, state: State, logger: Logger) -> None:
        """Refuse at INIT, before data and weights are loaded, what could only fail later."""
        check_run(state)
        if self.expansion:
            check_implementation(state, self.implementation)
        self._build(state, seed=0).remove()
        self._swiglu = FusedSwiGLU(
            state.model, self.fused_swiglu, device=_device(state), collector=self._place_ahead
        )
        self._expander = self._attachment = self._plan = None  # of an earlier trainer
        state.callbacks.append(_Detach(self))

    def _build(self, state: State, seed: int) -> Expander:
        return Expander(
            find_sites(state.model, self.targets),
            threshold=self.threshold,
            seed=seed,
            kv_heads=self.kv_heads,
            method=self.method,
            expansion=self.expansion,
            operator_lr_scale=self.operator_lr_scale,
            implementation=self.implementation,
            device=_device(state),
        )

    def _place_ahead(self, mlp: str, gate: Tensor) -> tuple[Tensor, Tensor | None] | None:
        return None if self._expander is None else self._expander.place_ahead(mlp, gate)

    def _start(self, state: State, logger: Logger) -> None:
        """FIT_START of a fresh, a resumed or a further fit."""
        self._swiglu.log_compiled(state.model)
        plan = self.stage_plan(state)
        if self._expander is not None:
            if self._plan != plan:
                raise ValueError(
                    f"stages: this run was laid out as {self._plan.describe()}, the further fit() "
                    f"makes it {plan.describe()}: keep max_duration, or start a new Trainer"
                )
            return
        self._plan = plan
        seed = state.rank_zero_seed if self.seed is None else self.seed
        self._expander = self._build(state, seed)
        self._attachment = self._expander.attach(state.optimizers[0])
        self._attachment.armed = False
        loaded, self._loaded = self._loaded, None
        batch = state.timestamp.batch.value
        self.lineage, self.branching = trace(self._branch, loaded, batch)
        if loaded is not None and self._resume(loaded, state, logger):
            return
        if loaded is None and batch > 0:
            warnings.warn(
                f"the checkpoint at batch {batch} was loaded without the "
                "state of apex. Its weights are usable as they are (operators are part of "
                "them); the current stage starts anew with a new assessment and new operators",
                stacklevel=2,
            )
        if self.method != "random":
            self._assess(state)
        self._begin_stage(plan.ended(state.timestamp), state, logger)

    def _resume(self, loaded: dict[str, Any], state: State, logger: Logger) -> bool:
        """Go on from a checkpoint; False where a branch has to start its stage anew."""
        stages, targets, batch = self._plan.describe(), list(self.targets), state.timestamp.batch
        settings = self._expander.settings()
        if self.branching and not keeps_the_stage(loaded, settings, targets, stages):
            self._expander.history = trained_records(loaded["history"], batch.value)
            return False
        if self.branching:
            loaded = {**loaded, "settings": settings}
        check_stages(loaded["stages"], stages, loaded["stage"] + 1)
        check_same("targets", loaded["targets"], targets)
        self._expander.load_state_dict(loaded)
        ended = self._plan.ended(state.timestamp)
        # The checkpoint of a finished run: its last stage is over, this run's next one begins.
        if self._expander.stage < ended < len(self._plan.ends):
            self._begin_stage(ended, state, logger)
        return True

    def _begin_stage(self, stage: int, state: State, logger: Logger) -> None:
        self._expander.stage = stage - 1
        self._expander.begin_stage(self._plan.expansion[stage] and self.expansion)
        self._expander.history[-1]["start_batch"] = state.timestamp.batch.value
        logger.log_metrics(stage_metrics(self._expander))

    def _arm(self, state: State, logger: Logger) -> None:
        self._attachment.armed = True
        batch = state.timestamp.batch.value
        self._expander.stopwatch.running = (batch + 1) % self.log_interval == 0

    def _begin_batch(self, state: State, logger: Logger) -> None:
        """Also runs when a batch is tried again in smaller microbatches after an OOM."""
        self._expander.assessment.discard()
        mask = attention_mask(state.batch)
        # A mask on the GPU cannot be looked at without waiting for it, so it counts as padded.
        self._padded = mask is not None and (mask.is_cuda or not bool(mask.all()))

    def _open(self, state: State, logger: Logger) -> None:
        # Counted from the stage's start, so that every stage has scores whatever the interval.
        start = self._expander.history[-1]["start_batch"]
        if (state.timestamp.batch.value - start) % self.interval == 0:
            mask = attention_mask(state.batch)
            self._expander.assessment.open(mask, full=not self._padded)

    def _close(self, state: State, logger: Logger) -> None:
        self._expander.assessment.close()

    def _end_batch(self, state: State, logger: Logger) -> None:
        """The clock has advanced: commit scores, log, and pass a stage's boundary."""
        self._attachment.armed = False
        self._expander.assessment.commit()
        if self._expander.stopwatch.running:
            logger.log_metrics(step_metrics(self._expander))
        ended, stages = self._plan.ended(state.timestamp), len(self._plan.ends)
        if ended == stages > self._plan.ended(state.previous_timestamp):
            logger.log_metrics(final_metrics(self._expander))
            self._expander.fuse()
        elif self._expander.stage < ended < stages:
            self._begin_stage(ended, state, logger)

    def _assess(self, state: State) -> None:
        """Scores for the first stage from forward passes over training data."""
        if self.tokens is not None:
            goal = AssessmentGoal("tok", self.tokens)
        else:
            share = math.ceil(DEFAULT_ASSESSED_SHARE * self._plan.ends[0])
            goal = AssessmentGoal(self._plan.unit.value, share)
        model, device = unwrapped(state.model), next(state.model.parameters()).device
        forward = forward_microbatches(model, state, self._expander.assessing)
        assess_training_data(model, state.train_dataloader, forward, goal, device)


def _device(state: State) -> torch.device:
    """Where the model will be; at INIT it is on the CPU."""
    if state.device.name == "gpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(state.device.name)


class _Detach(Callback):
    """Leaves the model folded and free of hooks when the trainer closes, also after an error."""

    def __init__(self, algorithm: APEX):
        self._algorithm = algorithm

    def close(self, state: State, logger: Logger) -> None:
        """Fold, and remove all hooks."""
        expander, attachment = self._algorithm._expander, self._algorithm._attachment
        if expander is not None:
            expander.remove()
        if attachment is not None:
            attachment.remove()
        if self._algorithm._swiglu is not None:
            self._algorithm._swiglu.remove()
