"""The first stage's scores: forward passes over training data before training."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import State, ensure_data_spec
from composer.core.precision import get_precision_context
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from apex_composer.assessment.collector import Assessment
from apex_composer.distributed import global_rank, sum_over_ranks
from apex_composer.trainer.batches import count_tokens, look_at, open_assessment
from apex_composer.trainer.dataloader_state import undisturbed
from apex_composer.trainer.out_of_memory import in_fitting_microbatches

# The paper assesses on 30 M tokens before stages of about 3 B.
DEFAULT_ASSESSED_SHARE = 0.01


@dataclass
class AssessmentGoal:
    """How much data the first assessment reads.

    Attributes:
        unit: `ba`, `sp` or `tok`.
        total: of all ranks together.
        done: so far.
    """

    unit: str
    total: int
    done: int = 0

    @property
    def reached(self) -> bool:
        """Whether enough has been read."""
        return self.done >= self.total

    def add(self, batch: Mapping[str, Any], device: torch.device) -> int:
        """Count a batch of this rank, and those of the others; returns how much that is."""
        if self.unit == "ba":
            size = 1
        else:
            own = batch["input_ids"].shape[0] if self.unit == "sp" else count_tokens(batch)
            size = int(sum_over_ranks(torch.tensor(own, device=device)))
        self.done += size
        return size


def first_goal(tokens: int | None, unit: str, first_stage: int) -> AssessmentGoal:
    """What the first assessment reads.

    Args:
        tokens: the setting, or None for a share of the first stage.
        unit: of the stages: `ba`, `sp` or `tok`.
        first_stage: its length in this unit.
    """
    if tokens is not None:
        return AssessmentGoal("tok", tokens)
    return AssessmentGoal(unit, math.ceil(DEFAULT_ASSESSED_SHARE * first_stage))


def assess_first_stage(state: State, assessment: Assessment, goal: AssessmentGoal) -> None:
    """Scores for the first stage from forward passes over training data, as the trainer's are.

    Args:
        state: that of the trainer, at FIT_START.
        assessment: collects the scores.
        goal: how much to read.
    """
    model, spec = state.model, ensure_data_spec(state.train_dataloader)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # without gradients there is nothing to synchronise

    def attempt(batch: Any) -> None:
        for microbatch in spec.split_batch(batch, state.device_train_microbatch_size):
            layout = look_at(microbatch)
            microbatch = state.device.batch_to_device(microbatch)
            with get_precision_context(state.precision, state.precision_config):
                open_assessment(assessment, microbatch, layout)
                model(microbatch)
                assessment.close()

    def forward(batch: Any) -> None:
        # A batch counts when all of its microbatches have fitted into memory.
        in_fitting_microbatches(state, lambda: attempt(batch), assessment.discard)
        assessment.commit()

    device = next(model.parameters()).device
    assess_training_data(model, state.train_dataloader, forward, goal, device)


def assess_training_data(
    model: nn.Module,
    dataloader: Any,
    forward: Callable[[Any], None],
    goal: AssessmentGoal,
    device: torch.device,
) -> None:
    """Run forward passes over the first batches that training will see.

    The order of training batches and all random states are left as they were found. Dropout is
    off (our choice: the scores belong to the model, not to a draw).

    Args:
        model: put into evaluation mode meanwhile.
        dataloader: of training.
        forward: runs the model on a batch, counting it towards the scores.
        goal: how much to read; where the data ends before, a warning says so.
        device: for sums over ranks.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30.0  # in a log every state of the bar stays
    bar = tqdm(
        desc="apex: first assessment",
        total=goal.total,
        unit=goal.unit,
        delay=5,
        mininterval=seconds,
        maxinterval=max(10.0, seconds),
        disable=global_rank() != 0,
    )
    with undisturbed(dataloader), bar, _evaluating(model), torch.no_grad():
        for batch in _one_epoch(dataloader):
            forward(batch)
            bar.update(goal.add(batch, device))
            if goal.reached:
                return
    warnings.warn(
        f"assessment: the training data ended after {goal.done} of {goal.total}{goal.unit}; the "
        "first stage's scores come from these",
        stacklevel=2,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _one_epoch(dataloader: Any) -> Iterator[Any]:
    """The loader's batches; a run resumed at an epoch's last batch starts with an empty one."""
    empty = True
    for batch in dataloader:
        empty = False
        yield batch
    if empty:
        yield from dataloader
