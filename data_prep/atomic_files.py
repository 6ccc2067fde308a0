"""Write files so that a half-written one never looks whole, also after a power cut."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from apex_composer.data_prep.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into an error that says what to do.

    Args:
        path: what is being written.

    Raises:
        DiskFullError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            error.errno,
            f"the disk is full while writing {path}. Make room and give the same command again: "
            "finished pieces and shards are kept. --dry-run tells how much room is needed",
        ) from error


def partial_name(name: str) -> str:
    """A name that no other process takes, also none of another machine with the same number.

    So a dying process of a killed run cannot write into this run's files.

    Args:
        name: that the file or folder will have.
    """
    return f"{name}.partial-{secrets.token_hex(6)}"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut.

    Args:
        folder: whose files were renamed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content last through a power cut.

    Args:
        path: file that was written.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name; it gets its own name, synced, when the block ends well.

    Args:
        path: file to write; its folder is created when missing.

    Raises:
        DiskFullError: the disk is full; nothing is left behind.
    """
    partial = path.with_name(partial_name(path.name))
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `new_file` does.

    Args:
        path: file to write.
        content: bytes.
    """
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does.

    Args:
        path: file to write.
        text: content.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read, as `write_bytes` does.

    Args:
        path: file to write.
        content: dicts, lists, strings and numbers.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, or return None where there is no such file.

    Args:
        path: the file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and start over.") from error


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
    partial = folder.with_name(partial_name(folder.name))
    with explain_full_disk(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in partial.iterdir():
                sync_file(path)
            sync_folder(partial)
            try:
                os.replace(partial, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder.parent)
