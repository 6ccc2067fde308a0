"""Ties a stage's operators to an optimizer: every `optimizer.step()` becomes an APEX step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from apex_composer.model.sites import Site
from apex_composer.operators.stage_operators import StageOperators

_LEFT_BEHIND = (
    "the model holds base weights, without what operators add to them: a step of a run with apex "
    "has failed, and the run is open. Call trainer.close() of its Trainer (without one: `remove()` "
    "of the Expander and of its attachment), which puts the operators' part back, then go on"
)
_MOVED_TOO_EARLY = (
    "the optimizer changed the weights before it called its closure, while they held W + T W[P]; "
    "it will put back a copy from there, to which T W[P] would be added a second time. With a SAM "
    "whose step() goes on from gradients that it is handed: attach to the optimizer inside it "
    "(`base_optimizer`). Allowed: to call the closure first"
)

_HALF_TAKEN = (
    "no memory was left for the operators' or the rows' part of a step whose other part was taken: "
    "tried again in smaller microbatches, the batch would be trained twice. Go on from the last "
    "checkpoint with a smaller device_train_microbatch_size, given as a number in place of `auto`"
)


class Attachment:
    """Step hooks of an optimizer that call `before_step` and `after_step` at the right moments.

    Without a closure the gradients are ready when `step()` is called. With one, forward and
    backward run inside `step()` (Composer does this), where a pre-hook fires too early, with the
    gradients of the step before: so the closure is wrapped and the work is done behind it. That
    is after gradient clipping and everything else which acts on gradients, in whatever order. An
    optimizer may call it several times (SAM, LBFGS): every call sees the effective weights of where
    the optimizer has gone, and the operators step once, from the last call's gradients.

    Args:
        running: the operators, of this stage and later ones.
        sites: the expanded ones.
        optimizer: the user's.

    Attributes:
        armed: False makes steps pass untouched. torch's checkpoint code calls phantom steps with
            zero gradients on loading.
        by_closure: True makes every step begin disarmed, to be armed while its closure runs. So
            the Composer algorithm acts on its own trainer's steps only: after an error that trainer
            may stay open while another one trains with the same optimizer. Default False.
    """

    def __init__(self, running: StageOperators, sites: Sequence[Site], optimizer: Optimizer):
        check_alone(sites, optimizer)
        self.armed, self.attached, self.by_closure = True, True, False
        self.sites, self._running = sites, running
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
        if self.by_closure:
            self.armed = False
        if not (self.armed or self.by_closure) or not self._running.operators:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if self.armed and not _gradients_overflowed(optimizer):
                # A GradScaler leaves the division by its scale to a fused optimizer.
                self._running.before_step(getattr(optimizer, "grad_scale", None))
            return None
        wrapped = self._wrap(closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _wrap(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        before, called = self._running.versions(), False

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal before, called
            moved = before is not None and self._running.versions() != before
            # A second call asks for the gradient where the optimizer has moved the weights to, on
            # all ranks. A first one may follow a step that died half-way on this rank alone.
            together, before, called = called, None, False
            if self.armed:
                self._running.ensure_folded(together)
            loss = closure(*args, **kwargs)
            if self.armed and moved:
                raise RuntimeError(_MOVED_TOO_EARLY)
            if self.armed:
                self._running.before_step()
                called = True
            elif not self._running.folded:
                raise RuntimeError(_LEFT_BEHIND)
            return loss

        return wrapped

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.armed:
            with no_retry():
                self._running.after_step()


@contextmanager
def no_retry() -> Iterator[None]:
    """Behind the main optimizer's step memory that runs out is no reason to repeat the batch.

    Raises:
        RuntimeError: in its place, which `device_train_microbatch_size: auto` does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise RuntimeError(_HALF_TAKEN) from error


def attachments(optimizer: Optimizer) -> list[Attachment]:
    """Those that act on an optimizer's steps."""
    owners = [getattr(h, "__self__", None) for h in optimizer._optimizer_step_pre_hooks.values()]
    return [owner for owner in owners if hasattr(owner, "by_closure")]


def check_alone(sites: Sequence[Site], optimizer: Optimizer) -> None:
    """Refuse sites on which another expander acts.

    Raises:
        RuntimeError: saying what to remove.
    """
    weights = {id(site.weight) for site in sites}
    for other in attachments(optimizer):
        if not weights.isdisjoint(id(site.weight) for site in other.sites):
            raise RuntimeError(
                "another expander of the same weights is attached to this optimizer, and both "
                "would act on every step: call remove() of its attachment, and of itself, first"
            )


def _gradients_overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler is about to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())
