"""Ties trained rows to the user's optimizer: after each of its steps the rows take theirs."""

from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

from apex_composer.operators.stage_operators import StageOperators
from apex_composer.operators.step_hooks import check_alone, no_retry
from apex_composer.trainable.training import RowTraining

_SCALED = (
    "the gradients of trained rows are scaled by a GradScaler, which unscales what the optimizer "
    "holds only. Allowed where only rows are trained: bf16 and float32, which need no scaling"
)


def attach_rows(
    running: StageOperators, training: RowTraining, optimizer: Optimizer
) -> "RowAttachment":
    """Make every step of the main optimizer one of the rows and of their operators too."""
    check_alone(training.sites, optimizer)
    try:
        training.follow(optimizer)
    except ValueError:
        training.remove()
        raise
    if training.optimizer is not None:
        running.follow(training.optimizer)
    return RowAttachment(running, training, optimizer)


class RowAttachment:
    """Step hooks by which rows and operators step behind the main optimizer.

    Args:
        running: the operators, which act on the rows' copies.
        training: the rows.
        optimizer: the user's.

    Attributes:
        sites: those of which rows are trained, for which another expander is refused.
        armed: False makes steps pass untouched, see `Attachment`.
        attached: whether the hooks are there.
        by_closure: True makes every step begin disarmed, to be armed while its closure runs.
    """

    def __init__(self, running: StageOperators, training: RowTraining, optimizer: Optimizer):
        self.armed, self.attached, self.by_closure = True, True, False
        self.sites, self._running, self._training = training.sites, running, training
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._optimizer, zero_grad = optimizer, optimizer.zero_grad

        # Its own no longer reaches the weights; the gradients of a batch that is given up go too.
        @wraps(zero_grad)
        def forget(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            training.zero_grad()

        optimizer.zero_grad = forget

    def remove(self) -> None:
        """Take the hooks off the optimizer, and give it back what it was to train."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        self._optimizer.__dict__.pop("zero_grad", None)
        self._training.remove()
        self.attached = False

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.by_closure:
            self.armed = False
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(_SCALED)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        training = self._training
        if not self.armed or training.optimizer is None:
            return
        with no_retry():
            training.take_changes()
            training.collect()
            self._running.before_step()
            training.optimizer.step()
            training.zero_grad()  # first, or the operators would remember the copies with theirs
            self._running.after_step()
            training.write()
