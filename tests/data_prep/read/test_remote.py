import gzip
import shutil

import pytest
from corpus import write_corpus

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read import remote
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import find_sources


def test_a_remote_store_reads_as_the_folder_does(tmp_path):
    store, cache = write_corpus(tmp_path / "store"), tmp_path / "cache"
    cache.mkdir()

    def read(input):
        return [
            document.text
            for source in find_sources(input)
            for document in read_documents(source, 0, None, pytest.fail, cache=cache)
        ]

    sources = find_sources(f"file://{store}")
    assert [source.path for source in sources][0] == f"file://{store}/book/book.jsonl"
    assert not any(source.splittable or source.bytes for source in sources)
    assert read(f"file://{store}/") == read(store)
    assert not list(cache.iterdir())  # downloads do not outlive their reading
    shutil.rmtree(store / "book")
    with pytest.raises(SourceError, match="book.jsonl cannot be fetched"):
        next(read_documents(sources[0], 0, None, pytest.fail, cache=cache))


def test_a_failed_download_is_tried_again(tmp_path, monkeypatch):
    from streaming.base.storage import CloudDownloader

    attempts = []

    def download(remote, local, timeout):
        attempts.append(remote)
        if len(attempts) < 3:
            raise RuntimeError("reset by peer")
        with gzip.open(local, "wb") as file:
            file.write(b"{}")

    monkeypatch.setattr(CloudDownloader, "direct_download", download)
    with remote.local_copy("s3://bucket/a/x.jsonl.gz", tmp_path) as path:
        assert path.name == "x.jsonl.gz" and path.is_file()
    assert attempts == ["s3://bucket/a/x.jsonl.gz"] * 3


def test_a_store_is_listed_by_streaming(monkeypatch, tmp_path):
    from streaming.base.storage import CloudUploader

    class Uploader:
        names = ["data/rp/book/x.jsonl", "data/rp2/y.jsonl", "data/rp/arxiv/z.jsonl.gz"]

        def __init__(self, out):
            self.local = str(tmp_path / "scratch")
            (tmp_path / "scratch").mkdir()

        def list_objects(self):
            if self.names is None:
                raise NotImplementedError("Uploader.list_objects is not implemented")
            return self.names

    monkeypatch.setattr(CloudUploader, "get", Uploader)
    assert remote.list_files("s3://bucket/data/rp") == ["arxiv/z.jsonl.gz", "book/x.jsonl"]
    with pytest.raises(FileNotFoundError, match="holds no file"):
        remote.list_files("s3://bucket/data/none")
    Uploader.names = None
    with pytest.raises(ValueError, match="cannot be listed by streaming: .*Mount it"):
        remote.list_files("s3://bucket/data/rp")
    assert not (tmp_path / "scratch").exists()
