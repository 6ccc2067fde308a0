"""Ties an Expander to an optimizer, so that every `optimizer.step()` is an APEX step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from apex_composer.expander import Expander


class Attachment:
    """Step hooks of an optimizer that call `before_step` and `after_step` at the right moments.

    Without a closure the gradients are ready when `step()` is called. With one, forward and
    backward run inside `step()` (Composer does this), where a pre-hook fires too early, with the
    gradients of the step before: so the closure is wrapped and the work is done behind it. That
    is after gradient clipping and everything else which acts on gradients, in whatever order.

    Attributes:
        armed: False makes steps pass untouched. torch's checkpoint code calls phantom steps with
            zero gradients on loading; the Composer algorithm is armed within a batch only.
    """

    def __init__(self, expander: "Expander", optimizer: Optimizer):
        self.armed = self.attached = True
        self._expander = expander
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self.attached = False

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]):
        if not self.armed or not self._expander.operators:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if not _gradients_overflowed(optimizer):
                # A GradScaler leaves the division by its scale to a fused optimizer.
                self._expander.before_step(getattr(optimizer, "grad_scale", None))
            return None
        return (args[0],), {**kwargs, "closure": self._wrap(closure)}

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._expander.ensure_folded()  # an earlier step may have died half-way
            loss = closure(*args, **kwargs)
            self._expander.before_step()
            return loss

        return wrapped

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._expander.after_step()


def _gradients_overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler is about to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())
