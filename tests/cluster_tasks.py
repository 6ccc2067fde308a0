"""Tasks for the tests of engines: workers import them by name."""

import os
import signal
import time
from pathlib import Path

from apex_composer.data_prep import errors
from apex_composer.data_prep.pieces import write_missing
from apex_composer.data_prep.tokens.piece import tokenise_piece


def double(task, report):
    """Twice a number, reported in parts."""
    for _ in range(task["number"]):
        report({"documents": 1, "source": task["name"]})
        report({"documents": 1, "source": task["name"]})
    time.sleep(task.get("seconds", 0))
    return 2 * task["number"]


def die(task, report):
    """Be killed."""
    report({"documents": 1, "source": task["name"]})
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_first(task, report):
    """Be killed at the first attempt, long after the reports."""
    marker = Path(task["marker"])
    result = double(task, report)
    if not marker.exists():
        marker.touch()
        report({"documents": 0, "source": task["name"]})
        time.sleep(2.5)  # the driver hears of the first attempt's documents
        die(task, report)
    return result


def die_when_done(task, report, done):
    """Be killed when a piece has its name, before anyone is told."""
    write_missing(task, report, tokenise_piece, done)
    if not (task["piece"].out / "died").exists():
        (task["piece"].out / "died").touch()
        die(task, report)
    return write_missing(task, report, None, done)


def fail(task, report):
    """Raise the error that the task names."""
    raise getattr(errors, task["error"])(*task["arguments"])
