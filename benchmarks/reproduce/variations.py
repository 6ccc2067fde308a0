"""APEX in an arm, with one thing of it varied where the arm says so."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from reproduce.arms import Arm
from reproduce.model import BatchOrder, token_losses
from reproduce.scales import Scale
from torch import nn

from apex_composer import Expander, find_sites


class Varied:
    """An expander on a model that is trained by plain torch.

    Args:
        model: of the base.
        optimizer: of its weights.
        arm: its `apex` are settings of `Expander`, its `variation` what is changed beyond them.
        seed: of the selection and the operators.
        order: batches, of which some are assessed before the first stage.
        scale: its settings.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        arm: Arm,
        seed: int,
        order: BatchOrder,
        scale: Scale,
    ):
        self._model, self._optimizer = model, optimizer
        self._arm, self._order, self._scale = arm, order, scale
        self.expander = Expander(find_sites(model), seed=seed, **arm.apex)

    @property
    def assessing(self) -> "AbstractContextManager[None]":
        """The context of every forward pass that trains."""
        return self.expander.assessing

    def clip(self, norm: float) -> None:
        """Clip the gradients of what is trained."""
        if self.expander.training is not None:
            self.expander.training.clip_grad_norm(norm)
        else:
            nn.utils.clip_grad_norm_(self._model.parameters(), norm)

    def begin(self, stage: int) -> dict[str, Any]:
        """Begin a stage; what is worth knowing of it."""
        if stage == 0:
            self._assess()
        self.expander.begin_stage()
        if stage == 0:
            self.expander.attach(self._optimizer)
        return {}

    @torch.no_grad()
    def _assess(self) -> None:
        """Forward passes over the run's first batches, before any of them trains."""
        for place in range(self._scale.probe_windows):
            with self.expander.assessing():
                token_losses(self._model, self._order.batch(place))

    def measure(self) -> dict[str, Any]:
        """At a stage's end: the operators' share of the rows that they write, by site."""
        norms = self.expander.relative_norms()
        return {"relative_norm": sum(norms.values()) / len(norms)} if norms else {}

    def end(self) -> None:
        """Fuse, and leave the model as it was found."""
        self.expander.fuse()
        self.expander.remove()
