"""A worker of a Ray cluster: checks that its node fits the driver's machine, and does tasks."""

import hashlib
import os
import socket
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import fenced
from apex_composer.data_prep.engines.local import Task, Work, one_thread, portable
from apex_composer.data_prep.errors import SettingsError

# Between two looks of a worker at whether anyone waits for it, and two messages with its reports.
CHECK_SECONDS = 1.0
# With others of these the same input may end as other bytes: tokens, parsed text, parquet and
# compressed shards, chats.
DECIDE_BYTES = ("tokenizers", "orjson", "pyarrow", "transformers", "jinja2")


@dataclass(frozen=True)
class Driver:
    """What a worker needs to know of the machine that gives the tasks.

    Args:
        address: of the cluster, for messages.
        folder: in which relative paths stand.
        fence: folder of its own in the output, in which workers write what is half-written, see
            `fenced`; or a file of an output that is only read. It shows that a node sees the same.
        versions: of apex_composer and of the packages that decide bytes.
    """

    address: str | None
    folder: str
    fence: Path
    versions: tuple[tuple[str, str], ...]


class Reports:
    """An actor that keeps what workers report until the driver takes it."""

    def __init__(self) -> None:
        self.news: dict[int, list[tuple[int, list[Any]]]] = defaultdict(list)

    def tell(self, key: int, first: int, news: list[Any]) -> None:
        """Take the next reports of an attempt; `first` is the number of those before."""
        self.news[key].append((first, news))

    def take(self) -> dict[int, list[tuple[int, list[Any]]]]:
        """Give away all that is new, by attempt."""
        news, self.news = dict(self.news), defaultdict(list)
        return news


def run_attempt(
    work: Work, task: Task, driver: Driver, key: int, reports_to: Any
) -> tuple[str, Any, list[Any]]:
    """Do a task.

    Args:
        key: of the attempt's reports.
        reports_to: the actor that takes them meanwhile.

    Returns:
        "result" and what the task returned, or "error" and what it raised, or the name of a node
        that does not see its input and what it raised; and all that it reported.
    """
    reports, told, checked_at = [], 0, time.monotonic()

    def report(news: Any) -> None:
        nonlocal told, checked_at
        reports.append(news)
        if time.monotonic() - checked_at > CHECK_SECONDS:
            reports_to.tell.remote(key, told, reports[told:])
            told, checked_at = len(reports), time.monotonic()
            check_node(driver)

    try:
        check_node(driver)
        with one_thread(), fenced(driver.fence):
            return "result", work(task, report), reports
    except Exception as error:
        path = task.get("input")
        is_unseen = isinstance(error, OSError) and path and not os.path.exists(path)
        return node_name() if is_unseen else "error", portable(error), reports


def check_node(driver: Driver) -> None:
    """Refuse to work on a node that would write to another folder, or other bytes.

    Raises:
        SettingsError: it does not see the output folder, or has other versions.
    """
    _check_process(driver)
    # Again and again: the driver removes the fence at its end, or the next one does where it was
    # killed, and so ends workers that nobody waits for, also of a node that is taken for dead.
    if not driver.fence.exists():
        raise SettingsError(
            f"{node_name()} does not see the output folder: {driver.fence} of the machine that "
            "gives the tasks is not there. Give an --out on a file system that all nodes of "
            f"address={driver.address!r} mount at the same path."
        )


@cache
def _check_process(driver: Driver) -> None:
    with suppress(OSError):  # then there must be no relative paths, or else they are not found
        os.chdir(driver.folder)
    own = dict(own_versions())
    for name, wanted in driver.versions:
        if own[name] != wanted:
            raise SettingsError(
                f"{node_name()} has {name} {own[name]}, and the machine that gives the tasks has "
                f"{wanted}: bytes could differ. Install the same on all nodes of "
                f"address={driver.address!r}, in the Python of their `ray start`."
            )


def node_name() -> str:
    """The node of this worker, for messages."""
    import ray

    address = ray.util.get_node_ip_address()
    node = ray.get_runtime_context().get_node_id()[:8]
    return f"The Ray node {socket.gethostname()} ({address}, {node})"


@cache
def own_versions() -> tuple[tuple[str, str], ...]:
    """Versions of this machine's apex_composer and of the packages that decide bytes."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):  # a checkout has one version number for long
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    own = f"{_version('apex-composer')} (source {digest.hexdigest()[:8]})"
    return ("apex-composer", own), *((name, _version(name)) for name in DECIDE_BYTES)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
