"""Run tasks in worker processes that may die, be interrupted, or lose their parent.

joblib's loky was tried in place of this: when a worker had died, all later tasks failed and none
was named; busy workers outlived a parent that was killed; Ctrl-C took 20 s.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from apex_composer.data_prep.errors import SettingsError, WorkerDiedError
from apex_composer.extras import needing

Task = dict[str, Any]
# Numbers since the last report, or a dictionary of them.
Report = Callable[[Any], None]
# A worker's function: the task, and a function that reports progress. Must be of a module.
Work = Callable[[Task, Report], Any]


def run_tasks(
    work: Work, tasks: Iterable[Task], workers: int, on_progress: Report = lambda progress: None
) -> Iterator[tuple[Task, Any]]:
    """Run tasks, in this process when `workers` is 1, else in processes of their own.

    Args:
        work: called with a task and a function for progress.
        tasks: each with a `name` for messages.
        workers: number of processes.
        on_progress: called with whatever a worker reports.

    Yields:
        Each task and its result, in the order in which they come.

    Raises:
        WorkerDiedError: a worker ended without an answer, killed for its memory for example.
        Exception: what a task raised.
        KeyboardInterrupt: Ctrl-C; no worker is left running.
    """
    if workers == 1:
        with one_thread():
            for task in tasks:
                yield task, work(task, on_progress)
        return
    with one_thread(), _processes(work, workers) as crew:
        yield from _supervise(crew, iter(tasks), on_progress)


def _supervise(
    crew: dict[Connection, Any], tasks: Iterator[Task], on_progress: Report
) -> Iterator[tuple[Task, Any]]:
    free, current = list(crew), {}
    while True:
        for connection, task in zip(free, tasks, strict=False):
            current[connection] = task
            with _explained_death(crew[connection], task):
                connection.send(task)
        if not current:
            return
        free = []
        for connection in wait(list(current)):
            with _explained_death(crew[connection], current[connection]):
                kind, content = connection.recv()
            if kind == "error":
                raise content
            if kind == "progress":
                on_progress(content)
            else:
                free.append(connection)
                yield current.pop(connection), content


@contextmanager
def _explained_death(process: Any, task: Task) -> Iterator[None]:
    """Say how a worker ended whose connection is closed, and at which task."""
    try:
        yield
    except (EOFError, OSError):
        process.join(timeout=5)
        code = process.exitcode
        cause = f"ended with status {code}"
        if code is not None and code < 0:
            cause = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        memory = " Signal 9 mostly means that memory ran out: use fewer --workers."
        raise WorkerDiedError(
            f"A worker process {cause} at {task['name']}.{memory if code == -9 else ''} Give the "
            "same command again: finished pieces and shards are kept."
        ) from None


def check_workers(workers: int | None) -> int:
    """Number of processes, by default one for each core that a container may use.

    Raises:
        SettingsError: it is below 1.
    """
    if workers is None:
        with needing("Counting cores (no number of workers is given)"):
            from joblib import cpu_count  # knows a container's limits; here, to start in a moment

        return cpu_count()
    if workers < 1:
        raise SettingsError(f"workers={workers} must be at least 1.")
    return workers


@contextmanager
def _processes(work: Work, count: int) -> Iterator[dict[Connection, Any]]:
    """Start workers; however the block ends, none of them is left."""
    # Not fork: a copy of a process with threads (torch's, the tokenizer's) may lock up.
    context = multiprocessing.get_context("spawn")
    context.set_executable(sys.executable)
    crew: dict[Connection, Any] = {}
    try:
        with _interrupt_held_back():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
                crew[ours] = process
        yield crew
    finally:
        for connection, process in crew.items():
            connection.close()
            process.kill()  # nothing half-written counts, so there is nothing to wait for
        for process in crew.values():
            process.join()


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the workers are started; they never hear one, even as they start.

    The mask is what a worker inherits. It is this thread's alone, and the progress bar has one of
    its own: the handler keeps a Ctrl-C that is heard there from ending a start half-way.
    """
    heard: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # only that one has handlers
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(1)) if is_main else None
    resource_tracker.ensure_running()  # starting it with the first worker would undo the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker: take a task, answer, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                answer = ("result", work(task, lambda p: connection.send(("progress", p))))
            except Exception as error:
                answer = ("error", portable(error))
            connection.send(answer)


def portable(error: Exception) -> Exception:
    """The error, or what says the same where it does not come through pickle as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """The workers are the parallelism: each of their tokenizers uses one thread."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ.update(before)
