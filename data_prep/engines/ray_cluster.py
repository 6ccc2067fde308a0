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
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import PARTIAL, remove
from apex_composer.data_prep.engines.local import Report, Task, Work, check_workers, one_thread
from apex_composer.data_prep.engines.ray_node import Driver, Reports, own_versions, run_attempt
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
# Between two counts of the nodes, which come and go, and two looks for reports.
COUNT_SECONDS = 1.0
# Bytes of a local Ray's store: what goes through it is small, the data is in files.
STORE_BYTES = 1 << 28
# For a local Ray, which sends nothing to anyone.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}


@dataclass
class Attempt:
    """A task that a worker of the cluster has, or will have again.

    Args:
        task: what is to be done.
        deaths: how many workers have died over it.
        key: of its reports.
        told: those that the progress bar has.
    """

    task: Task
    deaths: int
    key: int
    told: list[Any] = field(default_factory=list)

    def tell(self, first: int, news: list[Any], on_progress: Report) -> None:
        """Pass reports on, of which `first` is the number; where some were lost, wait for all."""
        if first == len(self.told):
            for one in news:
                on_progress(one)
            self.told += news

    def take_back(self, on_progress: Report) -> None:
        """Its worker has died: all will be reported again."""
        for one in self.told:
            on_progress(_negative(one))


def _negative(report: Any) -> Any:
    if isinstance(report, dict):
        return {name: _negative(value) for name, value in report.items()}
    return report if isinstance(report, str) else -report


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
    """
    import ray

    if not driver.fence.exists():
        driver.fence.mkdir()
    # Without Ray's own retries: a task that kills its workers is named.
    needs = {"num_cpus": 1, "memory": TASK_MEMORY, "max_retries": 0}
    remote = ray.remote(run_attempt).options(**needs)
    # On any node, and again on another when that dies: it needs next to nothing.
    reports = ray.remote(Reports).options(num_cpus=0, max_restarts=-1).remote()
    tasks, again, keys = iter(tasks), deque[Attempt](), count()
    running: dict[Any, Attempt] = {}
    limit, news, asked_at = 0, None, None
    while True:
        if asked_at is None or time.monotonic() - asked_at > COUNT_SECONDS:
            limit, asked_at = min(at_most, workers or _count_slots(is_local)), time.monotonic()
            news = reports.take.remote() if news is None else news
        while len(running) < limit and (attempt := _next(again, tasks, keys)):
            running[remote.remote(work, attempt.task, driver, attempt.key, reports)] = attempt
        if not running:
            return
        for ref in ray.wait([*running, *([news] if news else [])], timeout=COUNT_SECONDS)[0]:
            if ref == news:
                _pass_on(news, running.values(), on_progress)
                news = None
                continue
            attempt = running.pop(ref)
            answer = _receive(ref, attempt, on_progress)
            if answer is None:
                again.append(Attempt(attempt.task, attempt.deaths + 1, next(keys)))
            else:
                yield attempt.task, answer[0]


def _next(again: deque[Attempt], tasks: Iterator[Task], keys: Iterator[int]) -> Attempt | None:
    if again:
        return again.popleft()
    return next((Attempt(task, 0, next(keys)) for task in tasks), None)


def _pass_on(news: Any, running: Iterable[Attempt], on_progress: Report) -> None:
    """Tell the progress bar what workers have reported meanwhile."""
    import ray

    try:
        found = ray.get(news)
    except ray.exceptions.RayError:  # its node died; a result brings all reports along
        return
    for attempt in running:
        for first, own in found.get(attempt.key, []):
            attempt.tell(first, own, on_progress)


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


def _receive(ref: Any, attempt: Attempt, on_progress: Report) -> tuple[Any] | None:
    """The result of an attempt that has ended, or None when its worker died."""
    import ray

    task, deaths = attempt.task, attempt.deaths + 1
    try:
        kind, content, reports = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # what a task raises comes as a result
        lines = str(error).strip().splitlines()
        raise SettingsError(
            f"A Ray node cannot run apex_composer: {lines[0]}: {lines[-1].strip()}. Install the "
            "same apex-composer on all nodes, in the Python of their `ray start`."
        ) from error
    except ray.exceptions.RayError as error:
        attempt.take_back(on_progress)
        if deaths == ATTEMPTS:
            raise WorkerDiedError(
                f"{ATTEMPTS} workers of the Ray cluster died at {task['name']}, the last one so: "
                f"{str(error).strip().splitlines()[0]} Mostly memory has run out: give nodes fewer "
                "CPUs (`ray start --num-cpus`), or look at this file. Give the same command "
                "again: finished pieces and shards are kept."
            ) from error
        return None
    attempt.tell(len(attempt.told), reports[len(attempt.told) :], on_progress)
    if kind == "result":
        return (content,)
    path = task.get("input")
    if kind != "error" and os.path.exists(path):
        raise SettingsError(
            f"{kind} does not see {path} of the input, which this machine sees. Give an input on a "
            "file system that all nodes mount at the same path."
        )
    raise content
