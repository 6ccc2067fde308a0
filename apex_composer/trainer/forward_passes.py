"""Forward passes outside of training, as Composer's Trainer would run them."""

from collections.abc import Callable
from typing import Any

from composer.core import State, ensure_data_spec
from composer.core.precision import get_precision_context
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apex_composer.assessment.collector import Assessment
from apex_composer.trainer.first_assessment import (
    AssessmentGoal,
    assess_training_data,
    attention_mask,
    sequence_ids,
)
from apex_composer.trainer.out_of_memory import in_fitting_microbatches


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP: without gradients there is nothing to synchronise."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def assess_first_stage(state: State, assessment: Assessment, goal: AssessmentGoal) -> None:
    """Scores for the first stage from forward passes over training data.

    Args:
        state: of the trainer, at FIT_START.
        assessment: collects the scores.
        goal: how much to read.
    """
    model, device = unwrapped(state.model), next(state.model.parameters()).device
    forward = forward_microbatches(model, state, assessment)
    assess_training_data(model, state.train_dataloader, forward, goal, device)


def forward_microbatches(
    model: nn.Module, state: State, assessment: Assessment
) -> Callable[[Any], None]:
    """A function that counts a batch of the training dataloader towards the scores.

    Args:
        model: to run.
        state: of the trainer: microbatch size, device, precision.
        assessment: counts a batch when all of its microbatches have fitted into memory.
    """
    spec = ensure_data_spec(state.train_dataloader)

    def attempt(batch: Any) -> None:
        for microbatch in spec.split_batch(batch, state.device_train_microbatch_size):
            packed = sequence_ids(microbatch) is not None  # seen without waiting for a GPU
            microbatch = state.device.batch_to_device(microbatch)
            ids = microbatch["sequence_id"] if packed else None
            with get_precision_context(state.precision, state.precision_config):
                assessment.open(attention_mask(microbatch), ids)
                model(microbatch)
                assessment.close()

    def forward(batch: Any) -> None:
        in_fitting_microbatches(state, lambda: attempt(batch), assessment.discard)
        assessment.commit()

    return forward
