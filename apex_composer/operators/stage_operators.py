"""The operators of the running stage around an optimizer's step: who acts, and what trains them."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer.model.sites import Site
from apex_composer.operators.changes import Gradients, versions
from apex_composer.operators.executors import Executor
from apex_composer.operators.factor_optimizer import OperatorOptimizer
from apex_composer.operators.main_optimizer import param_group_places, warn_of_other_rates
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.stopwatch import Stopwatch


class StageOperators:
    """All operators together; none between stages, and in a stage without expansion.

    Args:
        lr_scale: the operators' learning rate over the main optimizer's; None: 1, with a warning
            where that does not suit them.
        stopwatch: clock that counts the time that steps take.

    Attributes:
        operators: the running stage's.
        executors: those who do their work.
    """

    def __init__(self, lr_scale: float | None, stopwatch: Stopwatch):
        self.operators: list[ExpansionOperator] = []
        self.executors: list[Executor] = []
        self._lr_scale, self._stopwatch = lr_scale, stopwatch
        self._main: Optimizer | None = None
        self._warned_of: Optimizer | None = None
        self._optimizer: OperatorOptimizer | None = None
        self._moments: Mapping[str, dict[str, Any]] = {}
        # By executor, as the last fold or unfold left the weights; none before the first.
        self._written: list[list[tuple[int, ...]]] = []
        self._mapped = Gradients()

    def begin(
        self,
        operators: Sequence[ExpansionOperator],
        executors: Sequence[Executor],
        moments: Mapping[str, dict[str, Any]],
    ) -> None:
        """Start a stage, or go on in one.

        Args:
            operators: one for each site, in the same order on all ranks.
            executors: those who together act for all operators.
            moments: their optimizer's, as `moments()` returned them; empty in a new stage.
        """
        if self._main is not None and operators:
            self.check([operator.site for operator in operators], self._main)
        self.operators, self.executors = list(operators), list(executors)
        self._moments, self._written = moments, []
        self._train()

    def end(self) -> None:
        """Drop the operators; they are part of the weights."""
        self.operators, self.executors = [], []
        self._optimizer, self._moments = None, {}

    def check(self, sites: Sequence[Site], main: Optimizer) -> None:
        """Refuse an optimizer that operators cannot follow; warn, once, of other rates.

        Raises:
            ValueError: as `param_group_places`.
        """
        places = param_group_places(sites, main)
        if self._lr_scale is None and main is not self._warned_of:
            warn_of_other_rates(main, places)
            self._warned_of = main

    def follow(self, main: Optimizer) -> None:
        """Train these and later operators as the main optimizer trains the weights."""
        self._main, self._moments = main, self.moments()
        self._train()

    def _train(self) -> None:
        """Build the operators' optimizer as soon as both they and the main one are known."""
        if self._main is not None and self.operators:
            self._optimizer = OperatorOptimizer(self.operators, self._main, self._lr_scale or 1.0)
            if self._moments:
                self._optimizer.load_state_dict(self._moments)
                self._moments = {}

    @property
    def folded(self) -> bool:
        """Whether the parameters hold the effective weights, as they do outside of steps."""
        return all(executor.folded for executor in self.executors)

    @torch.compiler.disable
    @torch.no_grad()
    def before_step(self, grad_scale: Tensor | None = None) -> None:
        """Gradients are ready: map them, and put the base weights back. Idle without operators.

        Args:
            grad_scale: factor that the gradients still have (from a GradScaler, with a fused
                optimizer); default none.

        Raises:
            RuntimeError: without an attached optimizer, after a step left half-way, for gradients
                mapped already, or for sharded weights changed since the last step.
        """
        if not self.operators:
            return
        if self._optimizer is None:
            raise RuntimeError("no optimizer to train operators with: call attach(optimizer) first")
        if not self.folded:
            raise RuntimeError(
                "a step begins while the parameters hold base weights: the step before it failed "
                "(call ensure_folded() before the next forward pass), or the optimizer's step() "
                "calls its base class's"
            )
        if self._mapped.any_unchanged():
            raise RuntimeError(
                "a step begins with the gradients of the step before, which were mapped to those "
                "of the base weights and would be mapped a second time. Call zero_grad() and "
                "backward() before each step"
            )
        with self._timed():
            for executor, seen, now in zip(
                self.executors, self._written, self.versions(), strict=False
            ):
                if seen != now:
                    executor.refresh()
            for executor in self.executors:
                executor.map_gradient()
            if grad_scale is not None:
                self._optimizer.divide_gradients(grad_scale)
            self._remember_gradients()
            for executor in self.executors:
                executor.unfold()
        self._written = self.versions()

    @torch.compiler.disable
    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has stepped on W: step on the factors, write the effective weights."""
        if self.folded:
            return
        with self._timed():
            try:
                self._optimizer.step()
            finally:  # an error must not leave the model with base weights
                for executor in self.executors:
                    executor.fold()
                self._written = self.versions()
        self._remember_gradients()  # the optimizer may have written them (a fused one unscales)

    def versions(self) -> list[list[tuple[int, ...]]]:
        """By executor, numbers that are others once a weight is written or replaced."""
        return [versions(executor.parameters()) for executor in self.executors]

    def _remember_gradients(self) -> None:
        self._mapped = Gradients(p for e in self.executors for p in e.parameters())

    def _timed(self) -> AbstractContextManager[None]:
        return self._stopwatch.block(self.operators[0].site.weight.device)

    def ensure_folded(self, together: bool = False) -> None:
        """Write the effective weights if a step has left the base weights behind.

        Args:
            together: whether T W[P] is computed anew, for W[P] has changed; all ranks must come
                here. Default False: this rank alone, after a step that failed.
        """
        if self.folded:
            return
        for executor in self.executors:
            if not executor.folded:
                executor.fold() if together else executor.restore()
        self._written = self.versions()

    def settle(self) -> None:
        """Fold after a step that died; within a living one there is nothing to save or to end.

        Raises:
            RuntimeError: the optimizer's step() is about to act on the base weights.
        """
        if not self.folded and self._main is not None and _is_stepping(self._main):
            raise RuntimeError(
                "state_dict(), load_state_dict(), begin_stage() or fuse() was called inside the "
                "optimizer's step() (by another hook of it), while the parameters hold the base "
                "weights that it is about to change. Call it before or after the step"
            )
        self.ensure_folded()

    def recover(self) -> None:
        """As `ensure_folded`, at a time when others may have put other weights in place."""
        if self.folded or self.versions() == self._written:
            self.ensure_folded()
            return
        warnings.warn(
            "apex: a step failed while the model held base weights, and the weights have changed "
            "since: by a part of that step, by other training or by loading. They are left as "
            "they are, for T W[P] may not belong to them. Load a checkpoint if they are the "
            "failed run's",
            stacklevel=2,
        )

    def moments(self) -> Mapping[str, dict[str, Any]]:
        """Of the operators' optimizer, by factor, on the CPU."""
        return deepcopy(self._moments) if self._optimizer is None else self._optimizer.state_dict()


def _is_stepping(optimizer: Optimizer) -> bool:
    """Whether its step() runs in this thread: no hook tells that one has died."""
    frame, code = sys._getframe(), type(optimizer).step.__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
