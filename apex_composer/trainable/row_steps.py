"""Ties trained rows to the user's optimizer: after each of its steps the rows take theirs."""

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

from apex_composer.model.sites import Site
from apex_composer.operators.stage_operators import StageOperators
from apex_composer.trainable.training import RowTraining


def attach_rows(
    running: StageOperators, training: RowTraining, optimizer: Optimizer
) -> "RowAttachment":
    """Make every step of the main optimizer one of the rows and of their operators too."""
    training.follow(optimizer)
    if training.optimizer is not None:
        running.follow(training.optimizer)
    return RowAttachment(running, training, training.sites, optimizer)


class RowAttachment:
    """Step hooks by which rows and operators step behind the main optimizer.

    Args:
        running: the operators, which act on the rows' copies.
        training: the rows.
        sites: the model's, for which another expander is refused.
        optimizer: the user's.

    Attributes:
        armed: False makes steps pass untouched, see `Attachment`.
        attached: whether the hooks are there.
        by_closure: True makes every step begin disarmed, to be armed while its closure runs.
    """

    def __init__(
        self,
        running: StageOperators,
        training: RowTraining,
        sites: Sequence[Site],
        optimizer: Optimizer,
    ):
        self.armed, self.attached, self.by_closure = True, True, False
        self.sites, self._running, self._training = sites, running, training
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
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.__dict__.pop("zero_grad", None)
        self.attached = False

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.by_closure:
            self.armed = False

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        training = self._training
        if not self.armed or training.optimizer is None:
            return
        training.take_changes()
        training.collect()
        self._running.before_step()
        training.optimizer.step()
        self._running.after_step()
        training.write()
        training.zero_grad()
