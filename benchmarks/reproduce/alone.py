"""One campaign at a time in a folder: two would train one base, and write over each other."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing; a killed process holds none.

    Raises:
        SystemExit: where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"--folder: another campaign works in {folder}. Wait for its end, or give another "
                "folder"
            ) from None
        yield
