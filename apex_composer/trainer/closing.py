"""What a run leaves behind when its trainer closes: an ordinary model."""

import weakref

from composer.core import Callback, State
from composer.loggers import Logger
from torch.optim import Optimizer

from apex_composer.expander import Expander
from apex_composer.model.fused_swiglu import FusedSwiGLU
from apex_composer.operators.step_hooks import Attachment
from apex_composer.trainer.trained_rows import TrainedRows

_ELSEWHERE = (
    "algorithms: this APEX object belongs to another Trainer, which was built with it after this "
    "one. Give every Trainer an APEX of its own"
)


class Closing(Callback):
    """Leaves the model folded and free of hooks when the trainer closes, also after an error.

    Its evaluations and predictions see the effective weights, also after a step that failed.
    Every run has its own, which knows that run's objects only: Python may collect a Trainer, and
    so close it, while the next one trains with the same algorithm.

    It leaves the callbacks while a checkpoint is loaded: there is nothing to load, but Composer
    would miss it in older checkpoints. Should loading fail, the model is closed when the state is
    collected.

    Args:
        swiglu: the run's.
        state: the run's state.
        rows: what the run has frozen, where it trains rows only.

    Attributes:
        handed_over: whether the algorithm belongs to a later trainer.
        rows: as given.
    """

    def __init__(self, swiglu: FusedSwiGLU, state: State, rows: TrainedRows | None = None):
        self.handed_over, self.rows = False, rows
        self._swiglu = swiglu
        self._held: list[Expander | Attachment] = []
        state.callbacks.append(self)
        weakref.finalize(state, self.close).atexit = False

    def step_aside(self, state: State) -> None:
        """Leave the callbacks, and the optimizer as checkpoints know it, while one is loaded."""
        if self.rows is not None:
            self.rows.take_out()
        state.callbacks.remove(self)

    def come_back(self, state: State) -> None:
        """The end of `step_aside`."""
        state.callbacks.append(self)
        if self.rows is not None:
            self.rows.hold_place()

    def attach(self, expander: Expander, optimizer: Optimizer) -> None:
        """Let a run's expander act on the optimizer's steps that its own trainer takes."""
        self._held.append(expander)  # it has hooks on the model, also if attaching is refused
        if self.rows is not None:
            self.rows.put_in()
        attachment = expander.attach(optimizer)
        attachment.by_closure = True
        self._held.append(attachment)

    def end_stages(self) -> None:
        """Fold, and remove the stages' hooks."""
        while self._held:
            self._held.pop().remove()

    def eval_start(self, state: State, logger: Logger) -> None:
        """After a step that failed: let an evaluation see the effective weights."""
        for held in self._held:
            if isinstance(held, Expander):
                held.ensure_folded()

    predict_start = eval_start

    def close(self, state: State | None = None, logger: Logger | None = None) -> None:
        """Fold, and remove all hooks."""
        self.end_stages()
        self._swiglu.remove()
        if self.rows is not None:
            self.rows.give_back()

    def hand_over(self) -> None:
        """Close, because the algorithm is given to another trainer."""
        self.close()
        self.handed_over = True

    def state_dict(self) -> dict:
        """Nothing; but a checkpoint of this run would hold the state of another.

        Raises:
            RuntimeError: the algorithm belongs to a later trainer.
        """
        if self.handed_over:
            raise RuntimeError(_ELSEWHERE)
        return {}


def check_owner(closing: Closing | None, state: State) -> None:
    """Refuse to act in a run whose algorithm was given to another trainer.

    Args:
        closing: the algorithm's latest run's.
        state: the state of the run that calls the algorithm.

    Raises:
        RuntimeError: it is another run.
    """
    if closing not in state.callbacks:
        raise RuntimeError(_ELSEWHERE)
