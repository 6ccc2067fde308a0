"""Tasks for the tests of engines: workers import them by name."""

import os
import random
import signal
import threading
import time
import zlib
from pathlib import Path

from apex_composer.data_prep import errors
from apex_composer.data_prep.engines.ray_node import run_attempt
from apex_composer.data_prep.pieces import write_missing
from apex_composer.data_prep.tokens.piece import tokenise_piece

DEATHS = 20


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
    """Be killed at the first attempt, when the driver has had time to see the reports."""
    marker = Path(task["marker"])
    time.sleep(1.1)  # the next report is sent at once
    result = double(task, report)
    if not marker.exists():
        marker.touch()
        time.sleep(2.5)
        die(task, report)
    return result


def run_and_die(work, task, driver, *reports):
    """Run a task; be killed at a random moment of the first attempt at some tasks."""
    name = "/".join(Path(task["name"]).parts[-3:])  # the same wherever the corpus is
    number, deaths = zlib.crc32(name.encode()), driver.fence.parents[2] / "deaths"
    is_chosen = number % 3 == 0 and len(list(deaths.iterdir())) < DEATHS
    if is_chosen and not (deaths / str(number)).exists():
        (deaths / str(number)).touch()
        delay = random.Random(number).uniform(0, 0.03)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        run_attempt(work, task, driver, *reports)
        time.sleep(10)  # killed before the answer, at the latest
    return run_attempt(work, task, driver, *reports)


def go_on(task, report):
    """Work for long, with reports."""
    Path(task["marker"]).touch()
    for _ in range(2000):
        time.sleep(0.1)
        report({"documents": 0, "source": task["name"]})


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
