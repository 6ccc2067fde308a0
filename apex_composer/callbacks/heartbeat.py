"""The callback `heartbeat`: a line now and then while nothing else is visible before training."""

import os
import threading
import time
from typing import Any

from apex_composer.extras import needing
from apex_composer.settings import check_keys, check_positive

with needing("Heartbeat"):
    from composer.core import Callback, Event, State
    from composer.loggers import Logger
    from composer.utils import dist

# What a run waits for after an event.
_PHASES = {
    Event.INIT: "building the trainer and loading the checkpoint",
    Event.AFTER_LOAD: "first evaluation and first assessment",
    Event.BEFORE_DATALOADER: "waiting for the first batch of data",
    Event.BATCH_START: "first step",
}


class Heartbeat(Callback):
    """Says every `seconds` what a run is waiting for, until its first batch is done (rank 0).

    A start of many minutes without a line is the most frequent complaint about large runs. The
    phases: the data and the model are built; the trainer and the checkpoint are loaded; the first
    assessment and evaluation; the first batch of data; the first step (compiling, communication).

    Args:
        seconds: time between two lines. Default 30.

    Raises:
        ValueError: it is not positive.
        TypeError: for unknown settings.
    """

    def __init__(self, seconds: float = 30.0, **unknown: Any):
        check_keys("heartbeat", unknown, ("seconds",))
        # No timer waits for centuries: from there on the thread would die with an OverflowError.
        seconds = check_positive("heartbeat: seconds", seconds, float)
        self._seconds = min(seconds, threading.TIMEOUT_MAX)
        self._phase = "building data and model"
        self._started = self._phase_started = time.monotonic()
        self._done = threading.Event()
        # From the start: the first long silence is before the trainer exists.
        if dist.get_global_rank() == 0:
            threading.Thread(target=self._beat, name="apex-heartbeat", daemon=True).start()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Note the phase that begins; after the first batch the run logs for itself."""
        if event in _PHASES:
            self._phase, self._phase_started = _PHASES[event], time.monotonic()
        elif event == Event.BATCH_END:
            self._done.set()

    def close(self, state: State, logger: Logger) -> None:
        """Also after an error."""
        self._done.set()

    def _beat(self) -> None:
        while not self._done.wait(self._seconds):
            now = time.monotonic()
            line = (
                f"apex-composer: {self._phase}, {now - self._phase_started:.0f} s "
                f"({now - self._started:.0f} s since the start)\n"
            )
            # os.write takes no lock of Python's that a forked data worker could inherit taken.
            os.write(2, line.encode())
