"""Segments that streaming left in /dev/shm: which of them no living process uses."""

import os
import re
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PROCESSES = Path("/proc")
# As streaming names them (its base/constant.py), behind a number of at least six digits.
_KINDS = (
    "locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|"
    "epoch_data"
)
_NAME = re.compile(rf"\d{{6,}}_({_KINDS})")
# The number of the first process namespace of a Linux machine (kernel: PROC_PID_INIT_INO).
_FIRST_NAMESPACE = "pid:[4026531836]"


def find_stale(
    folder: Path = SHARED_MEMORY, processes: Path = PROCESSES
) -> tuple[list[Path], list[Path]]:
    """Sort the segments by whether a process has them open or mapped.

    A segment counts as used, too, where that cannot be known: when it belongs to a user whose
    processes this one may not look into.

    Args:
        folder: place of the segments.
        processes: place where the kernel shows processes.

    Returns:
        Stale segments, and used ones.
    """
    segments = sorted(path for path in folder.glob("*") if _NAME.fullmatch(path.name))
    used, hidden = _look_into(processes) if segments else (set(), set())
    stale, in_use = [], []
    for path in segments:
        try:
            taken = str(path) in used or path.stat().st_uid in hidden
        except FileNotFoundError:
            continue  # its run has just ended
        (in_use if taken else stale).append(path)
    return stale, in_use


def remove_stale(
    paths: list[Path], folder: Path = SHARED_MEMORY, processes: Path = PROCESSES
) -> list[Path]:
    """Remove segments that are still stale now; returns those that were removed.

    Args:
        paths: segments that were found before, and perhaps confirmed by somebody meanwhile.
        folder: place of the segments.
        processes: place where the kernel shows processes.
    """
    still = set(find_stale(folder, processes)[0])
    removed = [path for path in paths if path in still]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def sees_all_processes() -> bool:
    """Whether every process of the machine is visible: not so inside a container."""
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_NAMESPACE
    except OSError:
        return False


def _look_into(processes: Path) -> tuple[set[str], set[int]]:
    """Files in shared memory that processes use, and users whose processes stay hidden."""
    used: set[str] = set()
    hidden: set[int] = set()
    for process in processes.glob("[0-9]*"):
        try:
            owner = process.stat().st_uid
        except OSError:
            continue  # it has just ended
        try:
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if "/dev/shm/" in line or str(SHARED_MEMORY) in line:
                    used.add(line.split(maxsplit=5)[5].removesuffix(" (deleted)"))
            for descriptor in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile; the next may be a segment
                    used.add(os.readlink(descriptor))
        except PermissionError:
            hidden.add(owner)
        except OSError:
            continue
    return used, hidden
