import errno
import os

import pytest

from apex_composer.data_prep.atomic_files import new_folder, write_bytes
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
