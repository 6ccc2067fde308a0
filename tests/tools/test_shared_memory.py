"""Segments of streaming with and without a living owner; nothing in use is ever removed."""

import os
from itertools import islice
from multiprocessing import shared_memory
from pathlib import Path

import own_names
import pytest

from apex_composer.tools import shared_memory as segments

FOLDER = segments.SHARED_MEMORY
# The last of the numbers that are this process's own.
NUMBERS = islice(own_names.numbers(), 997, 1000)
KINDS = ("locals", "barrier", "something_else")
MINE, STALE, OTHER = (f"{number}_{kind}" for number, kind in zip(NUMBERS, KINDS, strict=True))


@pytest.fixture
def left_behind():
    """A stale segment, a foreign file, and one that this process has open."""
    for name in (STALE, OTHER):
        (FOLDER / name).write_bytes(b"....")
    mine = shared_memory.SharedMemory(MINE, create=True, size=4)
    yield
    mine.close()
    for name in (MINE, STALE, OTHER):
        (FOLDER / name).unlink(missing_ok=True)
    shared_memory.resource_tracker.unregister(f"/{MINE}", "shared_memory")


@pytest.mark.skipif(not os.access(FOLDER, os.W_OK), reason="needs /dev/shm")
def test_only_segments_without_an_owner_are_stale(left_behind, tmp_path):
    # This process as the kernel shows it, without others that may be hidden on this machine.
    (tmp_path / str(os.getpid())).symlink_to("/proc/self")
    stale, used = segments.find_stale(processes=tmp_path)
    assert FOLDER / STALE in stale and FOLDER / MINE in used
    assert FOLDER / OTHER not in stale + used
    wanted = [FOLDER / STALE, FOLDER / MINE]
    removed = segments.remove_stale(wanted, processes=tmp_path)
    assert removed == [FOLDER / STALE]
    assert not (FOLDER / STALE).exists()
    assert (FOLDER / MINE).exists() and (FOLDER / OTHER).exists()


def fake_process(processes: Path, number: int, maps: str) -> Path:
    folder = processes / str(number)
    (folder / "fd").mkdir(parents=True)
    (folder / "maps").write_text(maps)
    return folder


def test_mapped_and_opened_segments_are_used(tmp_path):
    memory = tmp_path / "dev" / "shm"
    memory.mkdir(parents=True)
    for name in ("000000_locals", "000001_locals", "000002_locals"):
        (memory / name).write_bytes(b"....")
    processes = tmp_path / "proc"
    line = f"7f00-7f10 rw-s 00000000 00:18 42      {memory}/000000_locals (deleted)\n"
    fake_process(processes, 1, line)
    (fake_process(processes, 2, "") / "fd" / "3").symlink_to(memory / "000001_locals")
    stale, used = segments.find_stale(memory, processes)
    assert [path.name for path in stale] == ["000002_locals"]
    assert [path.name for path in used] == ["000000_locals", "000001_locals"]


def test_a_descriptor_that_is_closed_meanwhile_hides_no_other(tmp_path, monkeypatch):
    segment = tmp_path / "000000_locals"
    segment.write_bytes(b"....")
    descriptors = fake_process(tmp_path, 1, "") / "fd"
    for number in range(9):
        (descriptors / str(number)).symlink_to(segment)
    open_one, readlink = sorted(descriptors.iterdir())[-1], os.readlink

    def read(path):
        if path != open_one:
            raise FileNotFoundError
        return readlink(path)

    monkeypatch.setattr(os, "readlink", read)
    assert segments.find_stale(tmp_path, tmp_path) == ([], [segment])


def test_a_hidden_process_may_own_what_its_user_owns(tmp_path, monkeypatch):
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "000000_locals").write_bytes(b"....")
    fake_process(tmp_path / "proc", 1, "")

    def refuse(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    stale, used = segments.find_stale(tmp_path / "shm", tmp_path / "proc")
    assert stale == [] and len(used) == 1


def test_a_segment_that_its_owner_removes_meanwhile_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "000000_locals"
    path.write_bytes(b"....")
    monkeypatch.setattr(segments, "_look_into", lambda processes: (path.unlink() or set(), set()))
    assert segments.find_stale(tmp_path, tmp_path) == ([], [])


def test_a_machine_without_shared_memory_has_no_segments(tmp_path):
    assert segments.find_stale(tmp_path / "none") == ([], [])
