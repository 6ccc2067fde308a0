"""The output folder: what it already holds, and who may write to it."""

import errno
import fcntl
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from apex_composer.data_prep.atomic_files import read_json, remove_partial, write_json
from apex_composer.data_prep.choose.job_plan import check_same, read_plan
from apex_composer.data_prep.errors import OutputTakenError, SettingsError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import DOWNLOADS, LOCK, MANIFEST, PARTS, PLAN, WORK
from apex_composer.data_prep.read.remote import is_remote
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.tokenizer import TokenizerFacts
from apex_composer.data_prep.write.manifest import is_of_any_version, read_manifest
from apex_composer.data_prep.write.verify import missing_shards

# A file system that knows no locks, such as some network ones.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def check_apart(input: Path | str, out: Path) -> None:
    """Refuse an output inside the input, which a later run would read, and the reverse.

    Raises:
        SettingsError: one lies in the other, or the output is a file.
    """
    if out.exists() and not out.is_dir():
        raise SettingsError(f"out={str(out)!r} is a file. Give a folder.")
    if is_remote(input):
        return
    first, second = Path(input).resolve(), out.resolve()
    if first in (second, *second.parents) or second in first.parents:
        raise SettingsError(
            f"out={str(out)!r} and input={str(input)!r} lie one in the other. Give an output "
            "folder beside the input."
        )


def begun_format(input: Path | str, out: Path, format: str) -> str:
    """The format to read by: the one that `auto` found when a preparation of this input was begun.

    By now it may find another, or several: versions differ in the formats that they know.
    """
    if format != "auto":
        return format
    plan, finished = read_plan(out), read_manifest(out)
    earlier = asdict(plan) if plan is not None else finished or {"sources": []}
    root = f"{str(input).rstrip('/') if is_remote(input) else Path(input)}/"
    found = {one["format"] for one in earlier["sources"] if one["path"].startswith(root)}
    return found.pop() if len(found) == 1 else format


def open_target(
    out: Path, options: Options, sources: list[Source], tokenizer: TokenizerFacts
) -> dict[str, Any] | None:
    """Find out what the output folder holds: nothing, the beginning, or all of this preparation.

    Returns:
        The manifest when all is done, else None.

    Raises:
        SettingsError: it holds a preparation with other options, tokenizer or input.
        OutputTakenError: it holds something else.
        ValueError: it holds a finished preparation that has lost shards.
    """
    if not out.exists():
        return None
    finished, plan = read_manifest(out), read_plan(out)
    for earlier in (finished, plan and asdict(plan)):
        if earlier is not None:
            check_same(earlier, options, sources, tokenizer, out)
    check_ours(out)
    lost = missing_shards(out, finished) if finished is not None else []
    if lost:
        raise ValueError(
            f"out={str(out)!r} has a manifest, but {len(lost)} of its shards are gone or cut short "
            f"(the first is {lost[0]}). Bring them back, or give --overwrite to start over."
        )
    return finished


def check_ours(out: Path) -> None:
    """Refuse a folder that holds something else than a preparation, finished or begun.

    Raises:
        OutputTakenError: it does.
    """
    if not out.exists() or (out / LOCK).is_file():
        return
    if is_of_any_version(read_json(out / MANIFEST)):
        return
    if any(path.name != WORK for path in out.iterdir()) or any((out / WORK).glob("*")):
        raise OutputTakenError(
            f"out={str(out)!r} exists and was not written by this command. "
            "Give a folder that does not exist."
        )


def clear(out: Path) -> None:
    """Remove a preparation, locked; a kill in the midst leaves what a next call removes."""
    for path in (out / MANIFEST, out / PLAN):  # first: the rest must not look whole
        path.unlink(missing_ok=True)
    remove_partial(out)  # next: who is late must not write into what follows
    kept = {out / WORK, *out.glob(f"{LOCK}*")}
    for path in [*out.iterdir(), *(out / WORK).iterdir()]:
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(out: Path, part: tuple[int, int] | None) -> Iterator[None]:
    """Keep a second process off the same work; the lock ends with the process that holds it.

    The parts of one array job may run side by side, and nothing else may. Whoever is alone first
    removes what killed runs were writing.

    Args:
        out: output folder, made when missing.
        part: (i, n) for the i-th of an array job's n parts, or None for a whole preparation.

    Raises:
        OutputTakenError: another process is at it.
    """
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        whole = stack.enter_context((out / LOCK).open("w"))
        got = _lock(whole, fcntl.LOCK_EX)
        if got:
            remove_partial(out)
            shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
            if not (out / PLAN).exists() and not (out / MANIFEST).exists():
                clear(out)  # what a killed --overwrite has left
        if part is not None:
            if _lock(whole, fcntl.LOCK_SH) is False:
                raise _taken(out)
            _agree_on_parts(out, part[1], bool(got))
            name = f"{LOCK}-{part[0]}-of-{part[1]}"
            got = _lock(stack.enter_context((out / name).open("w")), fcntl.LOCK_EX)
        if got is False:
            raise _taken(out)
        yield


def _lock(file: IO[str], kind: int) -> bool | None:
    """Whether the lock is ours; None where nobody can know, so that nothing may be removed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{file.name} cannot be locked ({error.strerror}): this file system has no locks. "
            "Make sure that no two runs write the same part of this folder at a time",
            stacklevel=4,
        )
        return None
    return True


def _taken(out: Path) -> OutputTakenError:
    return OutputTakenError(
        f"out={str(out)!r} is being written by another process. Wait for it, end it, or "
        "give another folder."
    )


def _agree_on_parts(out: Path, parts: int, alone: bool) -> None:
    """Parts of different divisions would do the same pieces at the same time."""
    path = out / PARTS
    if alone:
        write_json(path, parts)
    elif read_json(path) not in (None, parts):
        raise OutputTakenError(
            f"shard=I/{parts}: this array job runs in {read_json(path)} parts at the moment. Give "
            "the same number of parts, or wait until they have ended."
        )
