"""All runs, one after the other: what is finished is not done again, what fails stops no other."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from typing import Any

from apex_composer.compare.configuration import Run
from apex_composer.compare.worker import CONFIG, LOG, RESULT, work
from apex_composer.data_prep.atomic_files import read_json, write_text
from apex_composer.data_prep.progress import progress_bar
from apex_composer.demo.__main__ import run_environment

# Loaded once, in the process that all runs are forked from; loading takes longer than many a run.
PRELOADED = ["llmfoundry.command_utils", "transformers.models.llama.modeling_llama", "peft"]


def finished_result(run: Run) -> dict[str, Any] | None:
    """The result of a run with these settings and inputs; None where it has not finished."""
    result = read_json(run.folder / RESULT)
    return result if result is not None and result["identity"] == run.identity else None


def run_all(runs: Sequence[Run], start: Callable[[Run], int]) -> dict[str, str]:
    """Start every run that has no result yet.

    Args:
        runs: in the order in which they are to run.
        start: trains one and returns its process' status.

    Returns:
        What went wrong, by the name of the run.
    """
    from omegaconf import OmegaConf

    errors: dict[str, str] = {}
    todo = [run for run in runs if finished_result(run) is None]
    with progress_bar(total=len(runs), initial=len(runs) - len(todo), desc="runs") as bar:
        for run in todo:
            bar.set_postfix_str(run.name)
            write_text(run.folder / CONFIG, OmegaConf.to_yaml(run.settings))
            (run.folder / RESULT).unlink(missing_ok=True)
            status = start(run)
            if finished_result(run) is None:
                errors[run.name] = f"status {status}, see {run.folder / LOG}"
                bar.write(f"error: {run.name} failed with {errors[run.name]}")
            bar.update()
    return errors


@contextmanager
def processes() -> Iterator[Callable[[Run], int]]:
    """A function that trains a run in a process of its own and returns its status.

    Processes are forked from one that has loaded llm-foundry and done nothing else, so that no run
    can reach another and none waits for the loading.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with changed_environment(run_environment()):
        forkserver.ensure_running()

    def start(run: Run) -> int:
        process = context.Process(target=work, args=(str(run.folder), run.identity))
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():  # this process was interrupted
                process.terminate()
                process.join()
        return process.exitcode

    # As at Ctrl-C: the run must not go on alone.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield start
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def changed_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that start meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
