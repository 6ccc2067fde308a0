"""The first stage's scores: forward passes over training data before training."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from composer.algorithms import EMA
from composer.core import Event, State, ensure_data_spec
from composer.core.precision import get_precision_context
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apex_composer.assessment.collector import Assessment
from apex_composer.data_prep.progress import progress_bar
from apex_composer.distributed import global_rank, sum_over_ranks
from apex_composer.trainer.batches import count_tokens, look_at, open_assessment
from apex_composer.trainer.dataloader_state import undisturbed
from apex_composer.trainer.out_of_memory import in_fitting_microbatches
from apex_composer.trainer.stage_plan import StagePlan

# The paper assesses on 30 M tokens before stages of about 3 B.
DEFAULT_ASSESSED_SHARE = 0.01


class Goal(NamedTuple):
    """How much data the first assessment reads: a total of all ranks, in `ba`, `sp` or `tok`."""

    unit: str
    total: int


def first_goal(tokens: int | None, plan: StagePlan) -> Goal:
    """What the first assessment reads.

    Args:
        tokens: the setting, or None for a share of the first stage.
        plan: the stages.
    """
    if tokens is not None:
        return Goal("tok", tokens)
    return Goal(plan.unit, math.ceil(DEFAULT_ASSESSED_SHARE * plan.ends[0]))


def assess_first_stage(state: State, assessment: Assessment, goal: Goal) -> None:
    """Scores for the first stage from forward passes over training data, as the trainer's are.

    Args:
        state: the trainer's, at FIT_START.
        assessment: collects the scores.
        goal: how much to read.
    """
    _put_training_weights(state)
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


def _put_training_weights(state: State) -> None:
    """EMA's average, which a checkpoint's model is, makes room for the weights that train.

    EMA itself brings them back in the first batch, too late to be assessed, and algorithms act on
    FIT_START in the order of their list.
    """
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_weights_active:
            algorithm.apply(Event.FIT_START, state, None)  # moves them to the model's device
            algorithm._ensure_training_weights_active(state)


def assess_training_data(
    model: nn.Module,
    dataloader: Any,
    forward: Callable[[Any], None],
    goal: Goal,
    device: torch.device,
) -> None:
    """Run forward passes over the first batches that training will see.

    The order of training batches and all random states are left as they were found. Dropout is
    off (our choice: the scores belong to the model, not to a draw).

    Args:
        model: the model, in evaluation mode meanwhile.
        dataloader: the training data.
        forward: a function that runs the model on a batch and counts it towards the scores.
        goal: how much to read; where the data ends before, a warning says so.
        device: where sums over ranks are made.
    """
    options = {"total": goal.total, "unit": goal.unit, "disable": global_rank() != 0}
    done, bar = 0, progress_bar(desc="apex: first assessment", delay=5, **options)
    with undisturbed(dataloader), bar, _evaluating(model), torch.no_grad():
        for batch in _one_epoch(dataloader):
            forward(batch)
            size = _size(batch, goal.unit, device)
            bar.update(size)
            done += size
            if done >= goal.total:
                return
    warnings.warn(
        f"assessment: the training data ended after {done} of {goal.total}{goal.unit}; the first "
        "stage's scores come from these",
        stacklevel=2,
    )


def _size(batch: Mapping[str, Any], unit: str, device: torch.device) -> int:
    """How much this rank's batch and those of the others come to."""
    if unit == "ba":
        return 1
    own = batch["input_ids"].shape[0] if unit == "sp" else count_tokens(batch)
    return int(sum_over_ranks(torch.tensor(own, device=device)))


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
