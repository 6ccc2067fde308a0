"""Forward passes outside of training, as Composer's Trainer would run them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from composer.core import State, ensure_data_spec
from composer.core.precision import get_precision_context
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apex_composer.first_assessment import attention_mask, sequence_ids


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP: without gradients there is nothing to synchronise."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def forward_microbatches(
    model: nn.Module,
    state: State,
    around: Callable[[Tensor | None, Tensor | None], AbstractContextManager[None]],
) -> Callable[[Any], None]:
    """A function that runs the model on a batch of the training dataloader.

    Args:
        model: to run.
        state: of the trainer: microbatch size, device, precision.
        around: makes the context of a forward pass from its attention mask and the sequence
            ids of packed rows.
    """
    spec = ensure_data_spec(state.train_dataloader)

    def forward(batch: Any) -> None:
        for microbatch in spec.split_batch(batch, state.device_train_microbatch_size):
            packed = sequence_ids(microbatch) is not None  # seen without waiting for a GPU
            microbatch = state.device.batch_to_device(microbatch)
            ids = microbatch["sequence_id"] if packed else None
            precision = get_precision_context(state.precision, state.precision_config)
            with precision, around(attention_mask(microbatch), ids):
                model(microbatch)

    return forward
