"""An upload that ends half-way is continued, not repeated."""

import pytest
from corpus import write_corpus
from prepared import file_hashes, small_options, tokenizer_folder
from streaming.base.storage.upload import LocalUploader

from apex_composer.data_prep import prepare, upload


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


def test_an_upload_goes_on_where_it_ended(tmp_path, uploads):
    corpus, out, store = write_corpus(tmp_path / "in", documents=60), tmp_path / "out", "store"
    prepare(corpus, out, tokenizer=tokenizer_folder(), options=small_options(), workers=1)
    uploads.fail_at = 5
    with pytest.raises(OSError, match="the store is gone. Give the same again"):
        upload(out, f"file://{tmp_path / store}")
    assert len(uploads.names) == 5 and not (tmp_path / store / "manifest.json").exists()
    uploads.fail_at = None
    upload(out, f"file://{tmp_path / store}")
    assert len(set(uploads.names)) == len(uploads.names)
    assert file_hashes(tmp_path / store) == file_hashes(out)


def test_an_upload_to_another_store_begins_anew(tmp_path, uploads):
    corpus, out = write_corpus(tmp_path / "in", documents=60), tmp_path / "out"
    prepare(corpus, out, tokenizer=tokenizer_folder(), options=small_options(), workers=1)
    uploads.fail_at = 5
    with pytest.raises(OSError, match="the store is gone"):
        upload(out, f"file://{tmp_path / 'one'}")
    uploads.fail_at = None
    upload(out, f"file://{tmp_path / 'two'}")
    assert file_hashes(tmp_path / "two") == file_hashes(out)
