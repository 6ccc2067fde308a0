"""An upload that ends half-way is continued, not repeated."""

import shutil
from pathlib import Path

import pytest
from prepared import file_hashes
from streaming.base.storage.upload import LocalUploader

from apex_composer.data_prep import upload


@pytest.fixture
def uploads(monkeypatch):
    """Names of the files in the order in which they are uploaded; the `fail_at`-th one fails."""
    names, whole = [], LocalUploader.upload_file

    def upload_file(self, name):
        if len(names) == uploads.fail_at:
            raise ConnectionError("the store is gone")
        whole(self, name)
        names.append(f"{self.local}/{name}")

    uploads = type("Uploads", (), {"names": names, "fail_at": None})
    monkeypatch.setattr(LocalUploader, "upload_file", upload_file)
    return uploads


@pytest.fixture
def out(prepared, tmp_path):
    return shutil.copytree(prepared[0] / "out", tmp_path / "out")


def test_an_upload_goes_on_where_it_ended(out, tmp_path, uploads):
    store = tmp_path / "store"
    uploads.fail_at = 5
    with pytest.raises(OSError, match="the store is gone. Give the same again"):
        upload(out, f"file://{store}")
    assert len(uploads.names) == 5 and not (store / "manifest.json").exists()
    uploads.fail_at = None
    upload(out, f"file://{store}")
    assert len(set(uploads.names)) == len(uploads.names)
    assert Path(uploads.names[-1]).name == "manifest.json"
    assert file_hashes(store) == file_hashes(out)


def test_an_upload_to_another_store_begins_anew(out, tmp_path, uploads):
    uploads.fail_at = 5
    with pytest.raises(OSError, match="the store is gone"):
        upload(out, f"file://{tmp_path / 'one'}")
    uploads.fail_at = None
    upload(out, f"file://{tmp_path / 'two'}")
    assert file_hashes(tmp_path / "two") == file_hashes(out)
