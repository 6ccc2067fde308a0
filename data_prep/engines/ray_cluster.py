"""Run tasks on a Ray cluster, whose nodes may come, go and die, or on a Ray of this machine.

A task is a function of files that all nodes see, and writes whole files and folders under names of
its own first: it may be done twice, also at once, also by a node that is taken for dead.
"""

import hashlib
import math
import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import PARTIAL
from apex_composer.data_prep.engines.local import (
    Report,
    Task,
    Work,
    check_workers,
    one_thread,
)
from apex_composer.data_prep.engines.ray_node import (
    REPORT_SECONDS,
    Driver,
    Reports,
    add,
    own_versions,
    run_attempt,
)
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
# Bytes of a local Ray's store: what goes through it is small, the data is in files.
STORE_BYTES = 1 << 28
# For a local Ray, which sends nothing to anyone.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}


@dataclass
class Attempt:
    """A task that is with the cluster, or will be again.

    Args:
        task: what is to be done.
        key: of its reports, a new one each time.
        deaths: how many workers have died over it.
        told: the sum of its reports that the progress bar has.
    """

    task: Task
    key: int
    deaths: int = 0
    told: Any = None

    def tell(self, total: Any, on_progress: Report) -> None:
        """Bring the progress bar to this sum of reports, None for none of them."""
        if self.told is not None and total is None:
            on_progress(add(None, self.told, -1))
        elif total != self.told:
            on_progress(total if self.told is None else add(total, self.told, -1))
        self.told = total


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

    path = out.absolute() / (known_file or f"{DRIVER}{PARTIAL}{secrets.token_hex(6)}")
    content = path.read_bytes() if known_file else path.name.encode()
    digest = hashlib.sha256(content).hexdigest()
    driver = Driver(address, os.getcwd(), path, digest, own_versions())
    is_ours = not ray.is_initialized()
    with one_thread():  # a local Ray's processes have this environment
        try:
            if is_ours:
                _connect(address, workers)
            # On any node, and again on another when that dies: it needs next to nothing.
            reports = ray.remote(Reports).options(num_cpus=0, max_restarts=-1).remote()
            yield Cluster(driver, reports, workers, is_ours and address is None).map_tasks
        finally:
            # What is still at work ends by that; ray.cancel(force=True) of Ray 2.60 may abort us.
            if known_file is None:
                path.unlink(missing_ok=True)
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
            "--head`) and give its address, or no --address for a Ray of this machine."
        ) from error


@dataclass
class Cluster:
    """A cluster that this process is connected to.

    Args:
        driver: this machine.
        reports: the actor that takes the workers' reports.
        workers: tasks at the same time, None for all cores.
        is_local: whether it is a Ray of this machine, which does not grow.
    """

    driver: Driver
    reports: Any
    workers: int | None
    is_local: bool
    slots: int = 0
    counted_at: float = -math.inf
    keys: Iterator[int] = field(default_factory=count)

    def map_tasks(
        self, work: Work, tasks: Iterable[Task], on_progress: Report, at_most: int
    ) -> Iterator[tuple[Task, Any]]:
        """Run tasks, see `MapTasks`; what a dead worker or node had is done again.

        Raises:
            WorkerDiedError: too many workers died over a task.
            SettingsError: a node does not fit.
        """

        if not self.driver.known_file.exists():
            self.driver.known_file.write_text(self.driver.known_file.name)
        tasks, again = iter(tasks), deque[Attempt]()
        running: dict[Any, Attempt] = {}
        news, asked_at = None, -math.inf
        while True:
            while len(running) < self._limit(at_most):
                attempt = again.popleft() if again else self._next(tasks)
                if attempt is None:
                    break
                running[self._start(work, attempt)] = attempt
            if not running:
                return
            if news is None and time.monotonic() - asked_at > REPORT_SECONDS:
                news, asked_at = self.reports.take.remote(), time.monotonic()
            for ref in _finished([*running, *([] if news is None else [news])]):
                if ref == news:
                    _pass_on(news, running.values(), on_progress)
                    news = None
                    continue
                attempt = running.pop(ref)
                answer = _receive(ref, attempt, on_progress)
                if answer is None:
                    again.append(Attempt(attempt.task, next(self.keys), attempt.deaths + 1))
                else:
                    yield attempt.task, answer[0]

    def _next(self, tasks: Iterator[Task]) -> Attempt | None:
        task = next(tasks, None)
        return None if task is None else Attempt(task, next(self.keys))

    def _start(self, work: Work, attempt: Attempt) -> Any:
        import ray

        # Without Ray's own retries, whose reports could not be told from those before.
        needs = {"num_cpus": 1, "memory": TASK_MEMORY, "max_retries": 0}
        remote = ray.remote(run_attempt).options(**needs)
        return remote.remote(work, attempt.task, attempt.key, self.reports, self.driver)

    def _limit(self, at_most: int) -> int:
        """Tasks that the cluster may have; nodes are counted now and then, they come and go."""
        import ray

        if time.monotonic() - self.counted_at > REPORT_SECONDS:
            self.counted_at = time.monotonic()
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            sizes = [(node.get("CPU", 0), node.get("memory", 0) / TASK_MEMORY) for node in alive]
            self.slots = sum(int(min(size)) for size in sizes)
            if not self.slots:
                _tell_of_no_room(self.is_local)
        return min(at_most, self.workers or self.slots + WAITING)


def _tell_of_no_room(is_local: bool) -> None:
    """No node has a core and the memory of a task: a cluster may grow, this machine does not."""
    needed = f"a core and {TASK_MEMORY >> 30} GiB of memory (`ray status` shows them)"
    if is_local:
        raise SettingsError(
            f"engine='ray': this machine has not {needed} for a task. Free some, or give the "
            "--address of a cluster."
        )
    warnings.warn(f"No node of the Ray cluster has {needed}: waiting for one", stacklevel=2)


def _finished(refs: list[Any]) -> list[Any]:
    """Those that have ended, after a while at most."""
    import ray

    if not ray.wait(refs, timeout=REPORT_SECONDS)[0]:
        return []
    return ray.wait(refs, num_returns=len(refs), timeout=0)[0]


def _pass_on(news: Any, running: Iterable[Attempt], on_progress: Report) -> None:
    """Tell the progress bar what the workers have reported."""
    import ray

    try:
        totals = ray.get(news)
    except ray.exceptions.RayError:  # its node died; what counts comes with the results too
        return
    for attempt in running:
        if attempt.key in totals:
            attempt.tell(totals[attempt.key], on_progress)


def _receive(ref: Any, attempt: Attempt, on_progress: Report) -> tuple[Any] | None:
    """The result of an attempt that has ended, or None when its worker died."""
    import ray

    name = attempt.task["name"]
    try:
        kind, content, total = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # what a task raises comes as a result
        lines = str(error).strip().splitlines()
        raise SettingsError(
            f"A Ray node cannot run apex_composer: {lines[0]}: {lines[-1].strip()}. Install the "
            "same apex-composer on all nodes, in the Python of their `ray start`."
        ) from error
    except ray.exceptions.RayError as error:
        attempt.tell(None, on_progress)  # it will all be reported again
        if attempt.deaths + 1 == ATTEMPTS:
            raise WorkerDiedError(
                f"{ATTEMPTS} workers of the Ray cluster died at {name}, the last one so: "
                f"{str(error).strip().splitlines()[0]} Mostly memory has run out: give nodes fewer "
                "CPUs (`ray start --num-cpus`), or look at this file. Give the same command "
                "again: finished pieces and shards are kept."
            ) from error
        return None
    attempt.tell(total, on_progress)
    if kind == "result":
        return (content,)
    path = attempt.task.get("input")
    if kind != "error" and os.path.exists(path):
        raise SettingsError(
            f"{kind} does not see {path} of the input, which this machine sees. Give an input on a "
            "file system that all nodes mount at the same path."
        )
    raise content
