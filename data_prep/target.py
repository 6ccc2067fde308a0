"""The output folder: what it already holds, and who may write to it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apex_composer.data_prep.manifest import MANIFEST, read_manifest
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.plan import WORK, check_same, read_plan
from apex_composer.data_prep.readers import Source


def open_target(
    out: Path, options: Options, sources: list[Source], tokenizer: dict[str, Any]
) -> dict[str, Any] | None:
    """Find out what the output folder holds: nothing, the beginning, or all of this preparation.

    Args:
        out: output folder.
        options: of the preparation.
        sources: its input.
        tokenizer: its tokenizer.

    Returns:
        The manifest when all is done, else None.

    Raises:
        SettingsError: it holds a preparation with other options, tokenizer or input.
        FileExistsError: it holds something else.
    """
    if not out.exists():
        return None
    finished, plan = read_manifest(out), read_plan(out)
    for earlier in (finished, plan):
        if earlier is not None:
            check_same(earlier, options, sources, tokenizer, out)
    if not is_ours(out) and any(out.iterdir()):
        raise FileExistsError(
            f"out={str(out)!r} exists and was not written by this command. "
            "Give a folder that does not exist."
        )
    return finished


def is_ours(out: Path) -> bool:
    """Whether the folder holds a preparation, finished or begun.

    Args:
        out: output folder.
    """
    return (out / WORK).is_dir() or (out / MANIFEST).is_file()


@contextmanager
def locked(out: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Keep a second process off the same work; the lock ends with the process that holds it.

    Args:
        out: output folder.
        shard: part of the array job, or None.

    Raises:
        FileExistsError: another process is at it.
    """
    name = "lock" if shard is None else f"lock-{shard[0]}-of-{shard[1]}"
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"out={str(out)!r} is being written by another process. Wait for it, end it, or "
                "give another folder."
            ) from error
        yield
