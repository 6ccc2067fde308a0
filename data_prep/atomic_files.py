"""Write files so that a half-written one never looks whole, also after a power cut."""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from apex_composer.data_prep.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT)
EXISTS = (errno.ENOTEMPTY, errno.EEXIST)
# Between the name that a file or folder will have, and a number that no other process takes, also
# none of another machine: a dying process of a killed run cannot write into this run's files.
PARTIAL = ".partial-"
# Where what is half-written stands; None: beside what it becomes.
_FENCE: ContextVar[Path | None] = ContextVar("fence", default=None)
REMOVAL_SECONDS = 10.0


@contextmanager
def fenced(folder: Path) -> Iterator[None]:
    """Write in a folder all that is half-written: once that is gone, nothing gets its name.

    However late a process is, and whatever it has checked, it cannot write into what another one
    has begun: its rename fails with FileNotFoundError.

    Args:
        folder: on the file system of what is written; it is not made.
    """
    before = _FENCE.set(folder)
    try:
        yield
    finally:
        _FENCE.reset(before)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name; it gets its own name, synced, when the block ends well.

    Args:
        path: file to write; its folder is created when missing.

    Raises:
        DiskFullError: the disk is full; nothing is left behind.
    """
    with _temporary(path) as partial:
        with partial.open("wb") as file:
            yield file
        _sync(partial)
        os.replace(partial, path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its own name when the block ends well.

    Args:
        folder: kept as it is where it exists by then: another process has finished it.

    Yields:
        The temporary folder. Every file in it is synced before the folder is renamed.

    Raises:
        DiskFullError: the disk is full; nothing is left behind.
    """
    with _temporary(folder) as partial:
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        try:
            os.replace(partial, folder)
        except OSError as error:
            if error.errno not in EXISTS:
                raise
            shutil.rmtree(partial)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name for the time being; what has it is removed unless the block ends well."""
    fence = _FENCE.get()
    partial = (fence or path.parent) / f"{path.name}{PARTIAL}{secrets.token_hex(6)}"
    try:
        if fence is None or fence.is_dir():  # else what is gone would be begun again
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(path.parent)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFullError(
                error.errno,
                f"the disk is full while writing {path}. Make room and give the same command "
                "again: finished pieces and shards are kept. How much room `prep` needs, its "
                "--dry-run tells",
            ) from error
        raise


def _sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> bool:
    """Remove a file or a folder that others may be writing to, which they notice; or nothing.

    Returns:
        False for a folder to which somebody goes on writing.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    moved = path.with_name(f"gone{PARTIAL}{secrets.token_hex(6)}")
    with suppress(FileNotFoundError):  # another process removes it
        os.replace(path, moved)  # at once: nothing comes into it under its name
    # Another machine may know a moved folder still, but not one that is no more.
    end = time.monotonic() + REMOVAL_SECONDS
    shutil.rmtree(moved, ignore_errors=True)
    while moved.exists() and time.monotonic() < end:
        time.sleep(0.01)
        shutil.rmtree(moved, ignore_errors=True)
    return not moved.exists()


def remove_partial(folder: Path) -> None:
    """Remove what killed runs were writing, at any depth.

    Args:
        folder: nobody else may be writing to it, but workers of a killed run that are yet to end:
            they fail, and may remove theirs meanwhile.

    Raises:
        OSError: a worker goes on writing: its pieces could get into those of this run.
    """
    for root, folders, files in os.walk(folder):  # bears what goes while it looks
        for name in (*folders, *files):
            if PARTIAL in name and not remove(Path(root, name)):
                raise OSError(
                    f"{Path(root, name)} of an earlier run cannot be removed: one of its processes "
                    "goes on writing there. End it, or wait, and give the same command again."
                )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `new_file` does."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `new_file` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read, as `new_file` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, or return None where there is no such file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and start over.") from error
