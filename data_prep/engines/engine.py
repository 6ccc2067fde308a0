"""The interface between the work and who does it: `map_tasks`, and the choice of an engine."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from apex_composer.data_prep.engines.local import Report, Task, Work, check_workers, run_tasks
from apex_composer.data_prep.errors import SettingsError
from apex_composer.extras import require

ENGINES = ("local", "ray")

# map_tasks(work, tasks, on_progress, at_most): every task with its result, in the order in which
# they come. Tasks are drawn as they are needed, `at_most` so many are worked on at a time,
# and what a task raises is raised. On_progress gets what the workers report.
MapTasks = Callable[[Work, Iterable[Task], Report, int], Iterator[tuple[Task, Any]]]


@dataclass(frozen=True)
class Engine:
    """Who does the work.

    Args:
        name: `local`, processes of this machine, or `ray`. Default: local.
        address: of the Ray cluster, such as `auto` or `ray://head:10001`. Default: None, the one
            that this process is connected to, or else a Ray of this machine for as long as it
            takes.
        workers: tasks at the same time. Default: None, one for each core, of a cluster that has an
            address of all of its nodes.

    Raises:
        SettingsError: there is no such engine, an address without Ray, or less than one worker.
        MissingExtraError: the extra `ray` is not installed.
    """

    name: str = "local"
    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise SettingsError(f"engine={self.name!r} must be one of {', '.join(ENGINES)}.")
        if self.address is not None and self.name != "ray":
            raise SettingsError(
                f"address={self.address!r} is that of a Ray cluster: give --engine ray with it."
            )
        if self.workers is not None:
            check_workers(self.workers)
        if self.name == "ray":
            require("engine='ray'", "ray")

    @contextmanager
    def opened(self, out: Path, known_file: str | None = None) -> Iterator[MapTasks]:
        """Make ready what does the work, for as long as the block lasts.

        Args:
            out: output folder, which all machines must see.
            known_file: file by which they know one that is only read. Default: None, a folder in
                it, which is made.

        Raises:
            SettingsError: no Ray cluster answers at the address.
        """
        if self.name == "local":
            yield partial(_map_locally, check_workers(self.workers))
            return
        from apex_composer.data_prep.engines.ray_cluster import connected

        with connected(self.address, self.workers, out, known_file) as map_tasks:
            yield map_tasks


def _map_locally(
    workers: int, work: Work, tasks: Iterable[Task], on_progress: Report, at_most: int
) -> Iterator[tuple[Task, Any]]:
    return run_tasks(work, tasks, min(workers, at_most), on_progress)
