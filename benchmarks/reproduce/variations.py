"""APEX in an arm, with one thing of it varied where the arm says so.

| variation | value | what it does |
|---|---|---|
| `sites` | `attention`, `ffn` | only these weights are expanded |
| `scores` | `gradient`, `gradient_weak` | units, or the weak ones alone, go by gradients |
| `right_scale` | factor | of R as it starts |
| `dense` | True | T is any n x n matrix |
| `tied` | True | one T for gate and up |
| `decay` | rate | weight decay of the operators' factors |
| `split` | True | the weak units become copies of the strong ones, see `splitting.py` |
| `authors` | some of PIECES | operators as in the authors' code, see `authors.py` |
| `fresh_moments` | True | the weights' moments begin from zero in every stage, the first one too |
| `plain_stages` | number | the first stages are conventional training |
| `noise` | share | of a copied row's size, that is added to the copy |
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from reproduce.arms import Arm
from reproduce.authors import PIECES, AuthorsOperators
from reproduce.gradient_scores import score_by_gradients
from reproduce.model import BatchOrder, token_losses
from reproduce.operator_variations import OPERATORS, vary_operators, vary_steps
from reproduce.scales import Scale
from reproduce.splitting import split, split_similarity
from reproduce.stage_facts import (
    count_facts,
    masked_losses,
    mean_loss,
    norm_facts,
    operator_facts,
    overlap_facts,
)
from torch import Tensor, nn

from apex_composer import Expander, find_sites
from apex_composer.settings import check_keys

TARGETS = {"attention": ["head"], "ffn": ["channel"]}
VARIATIONS = (
    "sites",
    "scores",
    "split",
    "noise",
    "authors",
    "fresh_moments",
    "plain_stages",
    *OPERATORS,
)


def check_variation(arm: Arm) -> None:
    """Refuse what would change nothing, or something else than its name says.

    Raises:
        TypeError: for an unknown variation.
        ValueError: for a value, or for settings beside it, with which it has no effect.
    """
    variation, apex = arm.variation, arm.apex
    check_keys("variation", variation, VARIATIONS)
    for name, value in variation.items():
        if value is None or value is False:
            raise ValueError(f"{name}: got {value}, allowed: True, or to leave it out")
    if variation.get("sites", "ffn") not in TARGETS:
        allowed = ", ".join(TARGETS)
        raise ValueError(f"sites: got {variation['sites']!r}, allowed: {allowed}")
    if "noise" in variation and "split" not in variation:
        raise ValueError("noise: acts on the copies that `split` makes, give both")
    if "dense" in variation and "right_scale" in variation:
        raise ValueError("right_scale: R is all ones with `dense`, give one of the two")
    if "scores" in variation and apex.get("method", "rank") != "rank":
        raise ValueError(f"scores: stands for the method, which is {apex['method']}: leave it out")
    own = [name for name in ("authors", *OPERATORS) if name in variation]
    idle = apex.get("expansion") is False or apex.get("trainable") == "disadvantageous"
    if idle and own:
        raise ValueError(f"{', '.join(own)}: varies operators, and this arm has none")
    if "authors" in variation:
        _check_authors(arm, own[1:])


def _check_authors(arm: Arm, others: Sequence[str]) -> None:
    if unknown := sorted(set(arm.variation["authors"]) - set(PIECES)):
        raise ValueError(f"authors: got {', '.join(unknown)}, allowed: {', '.join(PIECES)}")
    wrong = [*others, *(name for name in ("method", "trainable") if name in arm.apex)]
    if wrong:
        raise ValueError(
            f"authors: operators of all weights for units by rank, leave out {', '.join(wrong)}"
        )


class Varied:
    """An expander on a model that is trained by plain torch.

    Args:
        model: of the base.
        optimizer: of its weights.
        arm: its `apex` are settings of `Expander`, its `variation` what is changed beyond them.
        seed: of the selection and the operators.
        order: batches, of which some are assessed before the first stage.
        scale: its settings.

    Raises:
        TypeError, ValueError: as `check_variation`.
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
        check_variation(arm)
        self._model, self._optimizer, self._seed = model, optimizer, seed
        self._arm, self._order, self._scale = arm, order, scale
        sites = arm.variation.get("sites")
        settings = dict(arm.apex)
        if "scores" in arm.variation:
            settings["method"] = "average"  # selects by whatever stands where the norms stood
        if "authors" in arm.variation:
            settings["expansion"] = False  # its own operators stand in for the package's
        targets = None if sites is None else TARGETS[sites]
        self.expander = Expander(find_sites(model, targets), seed=seed, **settings)
        self.authors = self._authors() if "authors" in arm.variation else None

    @property
    def assessing(self) -> Callable[[], AbstractContextManager[None]]:
        """The context of every forward pass that trains."""
        return self.expander.assessing

    def clip(self, norm: float) -> None:
        """Clip the gradients of what is trained."""
        if self.expander.training is not None:
            self.expander.training.clip_grad_norm(norm)
        else:
            nn.utils.clip_grad_norm_(self._model.parameters(), norm)

    def begin(self, stage: int) -> dict[str, Any]:
        """Begin a stage; what is worth knowing of it, see `stage_facts.py`."""
        facts: dict[str, Any] = {}
        if stage == 0:
            facts["masked"] = masked_losses(self._model, self._batches(0), self._seed)
            self._assess()
        facts |= norm_facts(self.expander.assessment.totals())
        if scores := self._arm.variation.get("scores"):
            score_by_gradients(self.expander, self._model, self._batches(stage), scores)
        self.expander.begin_stage(
            False if stage < self._arm.variation.get("plain_stages", 0) else None
        )
        facts |= overlap_facts(self.expander.history[-1])
        facts |= count_facts(self.expander.selections)
        vary_operators(self.expander, self._arm.variation)
        if stage == 0:
            self.expander.attach(self._optimizer)
            vary_steps(self.expander, self._optimizer, self._arm)
        if self._arm.variation.get("fresh_moments"):
            self._optimizer.state.clear()
        if self._arm.variation.get("split"):
            facts |= self._split(stage)
        if self.authors is not None:  # of the weights as they are by now
            self.authors.begin()
        return facts

    def _authors(self) -> AuthorsOperators:
        pieces, scale = self._arm.variation["authors"], self._arm.apex.get("operator_lr_scale", 1.0)
        return AuthorsOperators(self.expander, self._optimizer, pieces, scale)

    def _batches(self, stage: int) -> list[Tensor]:
        """The first ones of a stage."""
        first = 0 if stage == 0 else self._arm.stage_ends(self._scale)[stage - 1]
        return [self._order.batch(first + place) for place in range(self._scale.probe_windows)]

    @torch.no_grad()
    def _assess(self) -> None:
        """Forward passes over the run's first batches, before any of them trains."""
        for batch in self._batches(0):
            with self.expander.assessing():
                token_losses(self._model, batch)

    def _split(self, stage: int) -> dict[str, Any]:
        batches = self._batches(stage)
        before = mean_loss(self._model, batches)
        noise = self._arm.variation.get("noise", 0.0)
        split(self.expander, self._optimizer, self._seed, noise)
        after = mean_loss(self._model, batches)
        return {"split_losses": {"before": before, "after": after}}

    def measure(self) -> dict[str, Any]:
        """At a stage's end: of the operators, and of the copies that were made."""
        facts = self.authors.facts() if self.authors else operator_facts(self.expander)
        if self._arm.variation.get("split"):
            facts["split_similarity"] = split_similarity(self.expander)
        return facts

    def end(self) -> None:
        """Fuse, and leave the model as it was found."""
        self.expander.fuse()
        self.expander.remove()
        if self.authors is not None:
            self.authors.end()
