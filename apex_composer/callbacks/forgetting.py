"""The callback `forgetting`: what a run has lost, and gained, since its first evaluation."""

import logging
import math
from collections import Counter
from typing import Any

import torch

from apex_composer.extras import needing

with needing("Forgetting"):
    from composer.core import Callback, State
    from composer.loggers import Logger
    from composer.utils import dist

log = logging.getLogger(__name__)

_METRIC = "LanguageCrossEntropy"
# What llm-foundry puts before the label of an eval_loader; one without a label is `eval`.
_PREFIX = "eval/"
_TOTAL = "total"


class Forgetting(Callback):
    """Logs `forgetting/<label>`: the loss of an evaluation minus that of the run's first one.

    In nats per token; above zero where the model has become worse. For each eval_loader with
    Composer's LanguageCrossEntropy, and where there are several `forgetting/total`, the same of all
    their tokens together, whenever all are evaluated. `eval_first: true` makes the first evaluation
    that of the model before training. Without it the first evaluation in training is the reference,
    and a warning at the start says so. References are a part of the checkpoint: a resumed run and a
    branch go on with them.
    """

    def __init__(self) -> None:
        # By label: nats per token and predicted tokens, of this evaluation and of the first.
        self._now: dict[str, list[float]] = {}
        self._first: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The first evaluation of every label."""
        return {"first": {label: list(numbers) for label, numbers in self._first.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's; one that was saved without this callback has none."""
        self._first = {label: list(numbers) for label, numbers in state.get("first", {}).items()}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say which eval_loaders have not been evaluated yet.

        Raises:
            ValueError: two would be logged under one name.
        """
        labels = _labels(state)
        names = [label.removeprefix(_PREFIX) for label in labels]
        if twice := [name for name, count in Counter([*names, _TOTAL]).items() if count > 1]:
            raise ValueError(
                f"forgetting: eval_loader has more than one {twice[0]!r} (`{_TOTAL}` is of all "
                "together): give it another label"
            )
        if not labels:
            log.warning(
                "forgetting: no eval_loader has the metric %s, so nothing is logged. Add an "
                "eval_loader, or remove the callback",
                _METRIC,
            )
        late = [label for label in labels if label not in self._first]
        if late:
            log.warning(
                "forgetting: %s not evaluated before batch %d: the next evaluation becomes the "
                "reference. `eval_first: true` makes it the model before training",
                ", ".join(late),
                state.timestamp.batch.value,
            )

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Forget the evaluation before."""
        self._now = {}

    eval_standalone_start = eval_before_all

    def eval_end(self, state: State, logger: Logger) -> None:
        """Take the loss of one eval_loader; the first time it is the reference."""
        label = state.dataloader_label
        metric = state.eval_metrics.get(label, {}).get(_METRIC)
        if metric is None:
            return
        tokens = metric.total_items.clone()  # of this rank; the loss is that of all
        dist.all_reduce(tokens)
        loss = torch.as_tensor(metric.compute()).item()
        now = [loss, tokens.item()]
        first = self._first.setdefault(label, now)
        self._now[label] = now
        if first[1] != now[1]:
            log.warning(
                "forgetting: %s has %d tokens, in the first evaluation it had %d: the difference "
                "is not that of the same text (eval_subset_num_batches, the data, or padding on "
                "another number of GPUs)",
                *(label, now[1], first[1]),
            )
        logger.log_metrics({f"forgetting/{label.removeprefix(_PREFIX)}": now[0] - first[0]})

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Log the total, where all of several eval_loaders were evaluated."""
        if len(self._now) > 1 and self._now.keys() == {*_labels(state)}:
            first = {label: self._first[label] for label in self._now}
            difference = _mean(self._now) - _mean(first)
            logger.log_metrics({f"forgetting/{_TOTAL}": difference})

    eval_standalone_end = eval_after_all


def _labels(state: State) -> list[str]:
    """The eval_loaders whose loss is measured."""
    labels = [evaluator.label for evaluator in state.evaluators]
    return [label for label in labels if _METRIC in state.eval_metrics.get(label, {})]


def _mean(losses: dict[str, list[float]]) -> float:
    """Nats per token over all labels."""
    tokens = sum(count for _, count in losses.values())
    return sum(loss * count for loss, count in losses.values()) / tokens if tokens else math.nan
