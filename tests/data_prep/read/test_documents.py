import json

import pytest
from corpus import write_jsonl
from reading import source_of

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import find_sources


def test_a_file_that_has_gone_is_an_error_that_names_it(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["one"])
    documents = read_documents(source_of(path), 0, None, print)
    path.unlink()
    with pytest.raises(SourceError, match="x.jsonl"):
        next(documents)


def test_an_error_of_the_caller_is_not_blamed_on_the_file(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [b"bad"])

    def fail(*_):
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        list(read_documents(source_of(path), 0, None, fail))
    assert not isinstance(caught.value, SourceError)


def test_v1_languages_are_a_string_here_and_a_list_there(tmp_path):
    for domain, language in [("github", [{"name": "C", "bytes": "1"}]), ("stackexchange", "en")]:
        row = {"text": domain, "meta": {"language": language}}
        write_jsonl(tmp_path / domain / "x.jsonl", [json.dumps(row).encode()])
    write_jsonl(tmp_path / "common_crawl" / "2019-30" / "en.jsonl.zst", [b'{"text": "cc"}'])
    found = [
        document
        for source in find_sources(tmp_path)
        for document in read_documents(source, 0, None, pytest.fail)
    ]
    assert [document.domain for document in found] == ["cc", "github", "stackexchange"]
