"""The callback `preemption`: a cluster's SIGTERM saves a checkpoint and ends the run in order."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apex_composer.callbacks.torn_checkpoints import repair
from apex_composer.extras import needing
from apex_composer.settings import check_keys, check_not_negative

with needing("Preemption"):
    from composer.callbacks import CheckpointSaver
    from composer.core import Callback, State
    from composer.loggers import Logger
    from composer.utils import dist
    from composer.utils.file_helpers import format_name_with_dist

MARKER = "preempted.json"
# A cluster that signals every process reaches a rank twice: directly, and through Composer's
# launcher, which hands its own SIGTERM on.
REPEAT_SECONDS = 5.0


class Preemption(Callback):
    """Saves and exits at the first SIGTERM, exits at once at a second one some seconds later.

    On the first, of any rank, all ranks finish the current batch, Composer's own saver writes a
    checkpoint as after any other batch (and waits for its upload), and all exit with
    `exit_status`. An evaluation that is under way is given up. The same command then goes on from
    there with `autoresume: true`. Before the first batch there is nothing to save: exit at once.
    After the last batch SIGTERM ends the process as without this callback.

    Beside the checkpoints, `preempted.json` tells a job script that the run wants to go on; the
    next start removes it, and a SIGTERM before its first batch writes it again. That start also
    repairs what a kill during a save has left (`torn_checkpoints.py`).

    Args:
        exit_status: status of a preempted run, 0 to 127. Default 0: Composer's launcher takes
            anything else for a crash.

    Raises:
        ValueError: for another status, or a run that saves no resumable checkpoints.
        TypeError: for unknown settings.
    """

    def __init__(self, exit_status: int = 0, **unknown: Any):
        check_keys("preemption", unknown, ("exit_status",))
        self.exit_status = check_not_negative("exit_status", exit_status, highest=127)
        self._asked_at: float | None = None
        self._in_batches = False
        self._previous: Any = None
        self._process = os.getpid()
        self._marker: Path | None = None
        self._begin = 0  # the batch from which the run goes on

    def init(self, state: State, logger: Logger) -> None:
        """Repair interrupted saves before autoresume looks for a checkpoint; watch for SIGTERM."""
        saver = next((c for c in state.callbacks if isinstance(c, CheckpointSaver)), None)
        if saver is None or saver.weights_only:
            raise ValueError(
                "callbacks: preemption needs checkpoints to resume from: set `save_folder` and "
                "leave `save_weights_only` at false, or remove the callback"
            )
        if dist.get_global_rank() == 0 and saver.remote_uploader is None:
            folder = Path(format_name_with_dist(saver.folder, state.run_name))
            self._marker = folder / MARKER
            self._marker.unlink(missing_ok=True)
            if saver.latest_filename is not None:
                for line in repair(folder, saver.filename.filename, saver.latest_filename.filename):
                    _say(line)
        dist.barrier()
        self._watch()

    def after_load(self, state: State, logger: Logger) -> None:
        """Shelter the workers that load data: the first assessment starts them at FIT_START."""
        self._begin = state.timestamp.batch.value
        self._shelter(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Watch in a further fit too; shelter also the workers of loaders that came with it."""
        self._watch()
        self._shelter(state)

    def batch_start(self, state: State, logger: Logger) -> None:
        """From here on there is something to save."""
        self._in_batches = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """A batch is done: save and exit if any rank was asked to."""
        self._leave_if_asked(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Evaluations between batches may take minutes: do not wait for their end."""
        if self._in_batches:
            self._leave_if_asked(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """All is saved: from now on SIGTERM is Composer's again."""
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Stop watching."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _watch(self) -> None:
        if self._previous is None:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a child that was forked with this handler
            os._exit(128 + number)
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > REPEAT_SECONDS:
                _say("second SIGTERM: exit without saving")
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
        elif self._in_batches:
            self._asked_at = time.monotonic()
            _say(
                f"SIGTERM: saving after this batch. Another one, after {REPEAT_SECONDS:.0f} s, "
                "exits at once"
            )
        else:
            self._mark(self._begin, 0.0)
            _say(f"SIGTERM before the first batch: nothing to save, exit status {self.exit_status}")
            sys.exit(self.exit_status)

    def _leave_if_asked(self, state: State, logger: Logger) -> None:
        # After the last batch only its evaluation is left: finish the run instead.
        if state.timestamp >= state.max_duration or not self._anyone_asked(state):
            return
        started = self._asked_at or time.monotonic()
        for saver in state.callbacks:
            if isinstance(saver, CheckpointSaver):
                saver.save_interval = lambda state, event: True
                saver.batch_checkpoint(state, logger)
                saver.fit_end(state, logger)  # waits for the upload
        if dist.get_global_rank() == 0:
            self._report(state.timestamp.batch.value, time.monotonic() - started)
        dist.barrier()
        raise SystemExit(self.exit_status)

    def _anyone_asked(self, state: State) -> bool:
        if dist.get_world_size() == 1:
            return self._asked_at is not None
        asked = torch.tensor([self._asked_at is not None], dtype=torch.uint8)
        asked = state.device.tensor_to_device(asked)
        dist.all_reduce(asked, reduce_operation="MAX")
        return bool(asked.item())

    def _report(self, batch: int, seconds: float) -> None:
        _say(
            f"saved after batch {batch}, {seconds:.1f} s after SIGTERM; exit status "
            f"{self.exit_status}. The same command goes on from there (autoresume: true)"
        )
        self._mark(batch, seconds)

    def _mark(self, batch: int, seconds: float) -> None:
        """Say that the run wants to go on, also where it was not begun (again) yet."""
        if self._marker is not None:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"batch": batch, "seconds_to_save": round(seconds, 1)})
            self._marker.write_text(text + "\n", encoding="utf-8")

    def _shelter(self, state: State) -> None:
        evaluated = [evaluator.dataloader.dataloader for evaluator in state.evaluators]
        for dataloader in (state.train_dataloader, *evaluated):
            shelter_workers(dataloader)


def _say(text: str) -> None:
    """One line on stderr; os.write because a signal may come while Python's own buffer is busy."""
    os.write(2, f"apex-composer: {text}\n".encode())


def shelter_workers(dataloader: Any) -> None:
    """Let a DataLoader's workers outlive a SIGTERM that the cluster sends to all processes.

    A dying worker would raise an error in the training process before it has saved. The training
    process itself can still end them.

    Args:
        dataloader: torch's, before it starts workers; anything else is left alone.
    """
    if getattr(dataloader, "num_workers", 0) and hasattr(dataloader, "worker_init_fn"):
        before = dataloader.worker_init_fn
        if not (isinstance(before, partial) and before.func is _shelter_this_worker):
            dataloader.worker_init_fn = partial(_shelter_this_worker, before)


def _shelter_this_worker(before: Callable[[int], None] | None, worker: int) -> None:
    # Blocked, SIGTERM waits for sigwaitinfo, which unlike a handler says who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_the_parent, daemon=True).start()
    if before is not None:
        before(worker)


def _obey_the_parent() -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid():
            os._exit(0)
