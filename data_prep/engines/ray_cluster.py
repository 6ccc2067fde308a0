"""Run tasks on a Ray cluster, whose nodes may come, go and die, or on a Ray of this machine.

A task is a function of files that all nodes see, and writes whole files and folders under names of
its own first: it may be done twice, also at once, also by a node that is taken for dead.
"""

import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import PARTIAL, remove
from apex_composer.data_prep.engines.local import Report, Task, Work, check_workers, one_thread
from apex_composer.data_prep.engines.ray_node import Driver, own_versions, run_attempt
from apex_composer.data_prep.errors import SettingsError, WorkerDiedError
from apex_composer.data_prep.paths import DRIVER

# Workers that may die over one task. A machine that is taken away is no fault of the task, and
# what kills its worker every time must come to an end.
ATTEMPTS = 5
# Of a task; tests/data_prep/test_memory.py holds it to less than 1 GB.
TASK_MEMORY = 1 << 30
# Tasks that wait for a core: one that is free finds the next at hand, and what adds nodes to a
# cluster by what waits adds them.
WAITING = 2
# Between two counts of the nodes, which come and go.
COUNT_SECONDS = 1.0
# Bytes of a local Ray's store: what goes through it is small, the data is in files.
STORE_BYTES = 1 << 28
# For a local Ray, which sends nothing to anyone.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}


@contextmanager
def connected(
    address: str | None, workers: int | None, out: Path, known_file: str | None
) -> Iterator[Any]:
    """Connect to a cluster, or start a Ray on this machine that ends with the block.

    Args:
        address: see `Engine`.
        workers: tasks at the same time, None for all cores.
        out: see `Engine.opened`.
        known_file: see `Engine.opened`.

    Yields:
        `map_tasks` of an engine.

    Raises:
        SettingsError: no cluster answers.
    """
    for name, value in QUIET.items():  # read when ray is imported
        os.environ.setdefault(name, value)
    import ray

    is_ours = not ray.is_initialized()
    if address is not None and not is_ours:
        raise SettingsError(
            f"address={address!r}: this process is connected to a Ray cluster already, which is "
            "used without an address. Leave it out, or call ray.shutdown() before."
        )
    fence = out.absolute() / (known_file or f"{DRIVER}{PARTIAL}{secrets.token_hex(6)}")
    driver = Driver(address, os.getcwd(), fence, own_versions())
    with one_thread():  # a local Ray's processes have this environment
        try:
            if is_ours:
                _connect(address, workers)
            yield partial(_map_tasks, driver, workers, is_ours and address is None)
        finally:
            # What is still at work ends by that; ray.cancel(force=True) of Ray 2.60 may abort us.
            if known_file is None:
                remove(fence)
            if is_ours:
                ray.shutdown()


def _connect(address: str | None, workers: int | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        size = {"num_cpus": check_workers(workers), "object_store_memory": STORE_BYTES}
        ray.init(address="local", include_dashboard=False, **size, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingsError(
            f"address={address!r}: no Ray cluster can be used there: {error} Start one (`ray start "
            "--head`) and give its address, or no --address for a Ray of this machine. A ray:// "
            "address of a cluster whose `ray start` tells of token authentication needs "
            "RAY_AUTH_MODE=token here too."
        ) from error


def _map_tasks(
    driver: Driver,
    workers: int | None,
    is_local: bool,
    work: Work,
    tasks: Iterable[Task],
    on_progress: Report,
    at_most: int,
) -> Iterator[tuple[Task, Any]]:
    """Run tasks, see `MapTasks`; what a dead worker or node had is done again.

    Args:
        driver: this machine.
        workers: tasks at the same time, None for all cores.
        is_local: whether it is a Ray of this machine, which does not grow.

    Raises:
        WorkerDiedError: too many workers died over a task.
        SettingsError: a node does not fit.
    """
    import ray

    if not driver.fence.exists():
        driver.fence.mkdir()
    # Without Ray's own retries: a task that kills its workers is named.
    needs = {"num_cpus": 1, "memory": TASK_MEMORY, "max_retries": 0}
    attempt = ray.remote(run_attempt).options(**needs)
    tasks, again = iter(tasks), deque[tuple[Task, int]]()
    running: dict[Any, tuple[Task, int]] = {}  # tasks, and how many workers have died over each
    limit, counted_at = 0, None
    while True:
        if counted_at is None or time.monotonic() - counted_at > COUNT_SECONDS:
            limit, counted_at = min(at_most, workers or _count_slots(is_local)), time.monotonic()
        while len(running) < limit and (task := _next(again, tasks)):
            running[attempt.remote(work, task[0], driver)] = task
        if not running:
            return
        for ref in ray.wait(list(running), timeout=COUNT_SECONDS)[0]:
            task, deaths = running.pop(ref)
            answer = _receive(ref, task, deaths + 1)
            if answer is None:
                again.append((task, deaths + 1))
                continue
            for news in answer[1]:
                on_progress(news)
            yield task, answer[0]


def _next(again: deque[tuple[Task, int]], tasks: Iterator[Task]) -> tuple[Task, int] | None:
    if again:
        return again.popleft()
    return next(((task, 0) for task in tasks), None)


def _count_slots(is_local: bool) -> int:
    """Tasks that the nodes of now have room for, and those that wait."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(node.get("CPU", 0), node.get("memory", 0) / TASK_MEMORY) for node in alive]
    slots = sum(int(min(size)) for size in sizes)
    if not slots:
        _tell_of_no_room(is_local)
    return slots + WAITING


def _tell_of_no_room(is_local: bool) -> None:
    """No node has a core and the memory of a task: a cluster may grow, this machine does not."""
    needed = f"a core and {TASK_MEMORY >> 30} GiB of memory (`ray status` shows them)"
    if is_local:
        raise SettingsError(
            f"engine='ray': this machine has not {needed} for a task. Free some, or give the "
            "--address of a cluster."
        )
    warnings.warn(f"No node of the Ray cluster has {needed}: waiting for one", stacklevel=2)


def _receive(ref: Any, task: Task, deaths: int) -> tuple[Any, list[Any]] | None:
    """Result and reports of an attempt that has ended, or None when its worker died.

    Args:
        deaths: how many of the task's workers have died when this one has.
    """
    import ray

    try:
        kind, content, reports = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # what a task raises comes as a result
        lines = str(error).strip().splitlines()
        raise SettingsError(
            f"A Ray node cannot run apex_composer: {lines[0]}: {lines[-1].strip()}. Install the "
            "same apex-composer on all nodes, in the Python of their `ray start`."
        ) from error
    except ray.exceptions.RayError as error:
        if deaths == ATTEMPTS:
            raise WorkerDiedError(
                f"{ATTEMPTS} workers of the Ray cluster died at {task['name']}, the last one so: "
                f"{str(error).strip().splitlines()[0]} Mostly memory has run out: give nodes fewer "
                "CPUs (`ray start --num-cpus`), or look at this file. Give the same command "
                "again: finished pieces and shards are kept."
            ) from error
        return None
    if kind == "result":
        return content, reports
    path = task.get("input")
    if kind != "error" and os.path.exists(path):
        raise SettingsError(
            f"{kind} does not see {path} of the input, which this machine sees. Give an input on a "
            "file system that all nodes mount at the same path."
        )
    raise content
