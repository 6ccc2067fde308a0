"""A run that trains rows only (`trainable`): what it refuses and freezes, and how it clips."""

import logging
from collections.abc import Callable
from weakref import WeakSet

import torch
from composer.algorithms import EMA
from composer.algorithms import GradientClipping as WholeClipping
from composer.core import Event, State
from composer.loggers import Logger

from apex_composer.model.sites import clean_name
from apex_composer.sharding.shards import reshard
from apex_composer.trainable.check import NO_FSDP1, Checked
from apex_composer.trainable.frozen import TakenOut, check_whole, freeze_others
from apex_composer.trainable.row_optimizer import check_main
from apex_composer.trainable.training import RowTraining
from apex_composer.trainer.run_checks import STILL_OPEN

log = logging.getLogger(__name__)


def check_rows(state: State, found: Checked) -> None:
    """Refuse runs in which the rows that are trained, if it is rows, could not be.

    Args:
        state: the trainer's, before wrapping.
        found: what there is to train.

    Raises:
        ValueError: for the sharding, the optimizer, its param groups, gradient clipping, or EMA.
    """
    if found.share is None:
        return
    if state.fsdp_config_version == 1:
        raise ValueError(NO_FSDP1)
    if getattr(state.fsdp_config, "load_monolith_rank0_only", False):
        raise ValueError(
            "fsdp_config: load_monolith_rank0_only: got true, allowed where rows are trained: "
            "false (the default). It wraps the model when the optimizer's state is read already"
        )
    check_main(state.optimizers[0])
    _check_groups(state, found)
    for algorithm in state.algorithms:
        if isinstance(algorithm, WholeClipping) and algorithm.clipping_type == "adaptive":
            raise ValueError(
                "gradient_clipping: clipping_type: got adaptive, allowed where rows are trained: "
                "norm, value"
            )
        if isinstance(algorithm, EMA):
            raise ValueError(
                "algorithms: got ema, allowed with apex: trainable: all. Checkpoints are saved "
                "while the average is in the model, and it would be taken for the trained rows"
            )


def _check_groups(state: State, found: Checked) -> None:
    check_whole(found.whole, state.model, state.optimizers[0])
    groups = [{id(p) for p in group["params"]} for group in state.optimizers[0].param_groups]
    rows = {id(p) for site in found.trained for p in site.parameters()}
    for place, group in enumerate(groups):
        if group <= rows:
            raise ValueError(
                f"optimizer: param group {place} holds nothing but weights of which only rows are "
                "trained. These leave the optimizer, and torch's checkpoints cannot hold an empty "
                "group. Allowed: groups with other parameters as well, as one of all the model's"
            )


class TrainedRows:
    """Freezes what a run does not train, and keeps the main optimizer's checkpoints in order.

    Freezing comes at INIT, before DDP or FSDP2 wrap the model. Before a checkpoint is loaded the
    weights of which rows are trained leave the main optimizer: torch makes moments of all that is
    in its param groups and not frozen, and asks checkpoints for them.

    Args:
        state: the trainer's, before wrapping.
        found: what there is to train.
        training: a function that returns the run's rows.
    """

    def __init__(self, state: State, found: Checked, training: Callable[[], RowTraining]):
        self._model, self._optimizer = state.model, state.optimizers[0]
        self._found, self._taken = found, None
        frozen = {id(p) for p in freeze_others(state.model, found.trained, found.whole)}
        # Wrapping may replace the parameters.
        self._frozen = {clean_name(n) for n, p in state.model.named_parameters() if id(p) in frozen}
        self._kept = None
        _OPEN.add(self)
        _clip_rows(state, training)
        log.info("apex: %s", found.share.describe())

    def acts_on(self, state: State) -> bool:
        """Whether a run would have this one's frozen parameters or its optimizer."""
        own, given = ({id(p) for p in m.parameters()} for m in (self._model, state.model))
        return not own.isdisjoint(given) or state.optimizers[0] is self._optimizer

    def take_out(self) -> None:
        """Take the weights out of the main optimizer until the stages' own training does."""
        self._taken = TakenOut(self._optimizer, self._found.trained)
        self.hold_place()

    def hold_place(self) -> None:
        """Give an optimizer that trains nothing some state; again once a checkpoint is loaded.

        torch cannot load a sharded optimizer without any, and would take a step to get some.
        """
        if self._found.whole:
            return
        if self._kept is None:
            frozen = (p for group in self._optimizer.param_groups for p in group["params"])
            self._kept = min(frozen, key=lambda parameter: parameter.numel())
        moments = {name: torch.zeros_like(self._kept) for name in ("exp_avg", "exp_avg_sq")}
        self._optimizer.state[self._kept] = {"step": torch.zeros(()), **moments}

    def put_in(self) -> None:
        """Put them back, for the stages' training to take."""
        if self._taken is not None:
            self._taken.give_back()
        self._taken = None

    def give_back(self) -> None:
        """Leave model and optimizer as they were found."""
        self.put_in()
        self._optimizer.state.pop(self._kept, None)
        reshard(self._found.trained)
        for name, parameter in self._model.named_parameters():
            if clean_name(name) in self._frozen:
                parameter.requires_grad_(True)
        self._frozen = set()
        _OPEN.discard(self)


_OPEN: WeakSet[TrainedRows] = WeakSet()


def check_not_frozen(state: State) -> None:
    """Refuse a model that an open run has frozen.

    Raises:
        RuntimeError: as `check_run` does for other traces of an open run.
    """
    if any(rows.acts_on(state) for rows in _OPEN):
        raise RuntimeError(STILL_OPEN)


class GradientClipping(WholeClipping):
    """Composer's GradientClipping, which sees the gradients of trained rows as well.

    Args:
        given: the one whose place it takes.
        training: a function that returns the run's rows.
    """

    def __init__(self, given: WholeClipping, training: Callable[[], RowTraining]):
        super().__init__(given.clipping_type, given.clipping_threshold)
        self._training = training

    def match(self, event: Event, state: State) -> bool:
        """Behind the last microbatch, as Composer's."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip rows and what is trained whole, by their common norm or each entry."""
        training = self._training()
        norm = self.clipping_type == "norm"
        clip = training.clip_grad_norm if norm else training.clip_grad_value
        clip(self.clipping_threshold)


def _clip_rows(state: State, training: Callable[[], RowTraining]) -> None:
    """Let every GradientClipping of a run see the rows; checkpoints know both by one name."""
    state.algorithms = [
        GradientClipping(algorithm, training) if isinstance(algorithm, WholeClipping) else algorithm
        for algorithm in state.algorithms
    ]
