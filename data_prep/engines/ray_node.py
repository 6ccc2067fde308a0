"""A worker of a Ray cluster: checks that its node fits the driver's machine, and does tasks."""

import hashlib
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apex_composer.data_prep.engines.local import Task, Work, one_thread, portable
from apex_composer.data_prep.errors import SettingsError

# Between two reports of a worker, and of all of them to the driver.
REPORT_SECONDS = 1.0
# With others of these the same input may end as other bytes: tokens, parsed text, parquet and
# compressed shards, chats.
DECIDE_BYTES = ("tokenizers", "orjson", "pyarrow", "transformers", "jinja2")


@dataclass(frozen=True)
class Driver:
    """What a worker needs to know of the machine that gives the tasks.

    Args:
        address: of the cluster, for messages.
        folder: in which relative paths stand.
        known_file: file in the output folder, by which a node shows that it sees the same one.
        content: sha256 of that file.
        versions: of apex_composer and of the packages that decide bytes.
    """

    address: str | None
    folder: str
    known_file: Path
    content: str
    versions: tuple[tuple[str, str], ...]


class Reports:
    """An actor that keeps the last report of every attempt until the driver has taken it."""

    def __init__(self) -> None:
        self.news: dict[int, Any] = {}

    def tell(self, key: int, total: Any) -> None:
        """Take the sum of an attempt's reports."""
        self.news[key] = total

    def take(self) -> dict[int, Any]:
        """Give away all reports."""
        news, self.news = self.news, {}
        return news


def run_attempt(
    work: Work, task: Task, key: int, reports: Any, driver: Driver
) -> tuple[str, Any, Any]:
    """Do a task.

    Args:
        key: of the attempt's reports.
        reports: the actor that takes them.

    Returns:
        "result" and what the task returned, or "error" and what it raised, or the name of a node
        that does not see its input and what it raised; and the sum of the reports.
    """
    total, told_at = None, time.monotonic()

    def report(news: Any) -> None:
        nonlocal total, told_at
        total = add(total, news)
        if time.monotonic() - told_at > REPORT_SECONDS:  # a worker may have many in a second
            told_at = time.monotonic()
            reports.tell.remote(key, total)
            check_node(driver)

    try:
        check_node(driver)
        with one_thread():
            return "result", work(task, report), total
    except Exception as error:
        path = task.get("input")
        is_unseen = isinstance(error, OSError) and path and not os.path.exists(path)
        return node_name() if is_unseen else "error", portable(error), total


def add(first: Any, second: Any, sign: int = 1) -> Any:
    """The sum of two reports: numbers, or dictionaries of them, whose texts are the second's.

    Args:
        first: None for nothing.
        sign: -1 for the difference.
    """
    if isinstance(second, dict):
        return {name: add((first or {}).get(name), value, sign) for name, value in second.items()}
    return second if isinstance(second, str) else (first or 0) + sign * second


def check_node(driver: Driver) -> None:
    """Refuse to work on a node that would write to another folder, or other bytes.

    Raises:
        SettingsError: it does not see the output folder, or has other versions.
    """
    _check_process(driver)
    # Again and again: the driver removes the file at its end, or the next one does where it was
    # killed, and so ends workers that nobody waits for, also of a node that is taken for dead.
    _check_folder(driver, driver.known_file.exists())


@cache
def _check_process(driver: Driver) -> None:
    with suppress(OSError):  # then there must be no relative paths, or else they are not found
        os.chdir(driver.folder)
    content = None
    with suppress(OSError):
        content = hashlib.sha256(driver.known_file.read_bytes()).hexdigest()
    _check_folder(driver, content == driver.content)
    own = dict(own_versions())
    for name, wanted in driver.versions:
        if own[name] != wanted:
            raise SettingsError(
                f"{node_name()} has {name} {own[name]}, and the machine that gives the tasks has "
                f"{wanted}: bytes could differ. Install the same on all nodes of "
                f"address={driver.address!r}, in the Python of their `ray start`."
            )


def _check_folder(driver: Driver, is_seen: bool) -> None:
    if not is_seen:
        raise SettingsError(
            f"{node_name()} does not see the output folder: {driver.known_file} is not there as "
            f"the machine that gives the tasks has it. Give an --out on a file system that all "
            f"nodes of address={driver.address!r} mount at the same path."
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
