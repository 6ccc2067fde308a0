import errno
import os

import pytest

from apex_composer.data_prep import atomic_files
from apex_composer.data_prep.atomic_files import new_folder, remove_partial, write_bytes
from apex_composer.data_prep.errors import DiskFullError


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="the disk is full while writing .*Make room"):
        write_bytes(tmp_path / "file", b"x")
    with pytest.raises(DiskFullError), new_folder(tmp_path / "folder") as partial:
        (partial / "x").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_goes_on_writing_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "000001.partial-0").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "REMOVAL_SECONDS", 0.05)
        patch.setattr(atomic_files.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(OSError, match="000001.partial-0 of an earlier run cannot be removed"):
            remove_partial(tmp_path)
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
