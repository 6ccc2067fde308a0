import json
import sys

import pyarrow
import pytest

from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.demo import embedded
from apex_composer.demo.embedded import choose_documents, module_docstrings


def read(folder):
    texts = {}
    for source in find_sources(folder):
        for document in read_documents(source, 0, None, pytest.fail):
            texts.setdefault(document.domain, []).append(document.text)
    return texts


def test_it_has_three_domains_of_limited_size_and_is_deterministic(tmp_path):
    first = read(embedded.write_embedded_corpus(tmp_path / "a", domain_limit=300_000))
    second = read(embedded.write_embedded_corpus(tmp_path / "b", domain_limit=300_000))
    assert first == second
    assert list(first) == ["documentation", "github", "packages"]
    for texts in first.values():
        assert len(set(texts)) == len(texts) > 5
        assert 150_000 < sum(len(text.encode()) for text in texts) <= 300_000


def test_it_is_in_redpajama_format(tmp_path):
    folder = embedded.write_embedded_corpus(tmp_path / "a", domain_limit=20_000)
    with pyarrow.input_stream(str(folder / "github" / "github.jsonl.zst")) as stream:
        record = json.loads(stream.read().splitlines()[0])
    assert set(record) == {"text", "meta"}
    assert record["meta"]["source"].startswith("stdlib/")


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        embedded.write_embedded_corpus(tmp_path)


def test_no_sources_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="DATA=<folder>"):
        list(embedded.standard_library_sources())


def test_licences_that_differ_in_their_owner_count_once():
    body = "Permission is granted. " * 40
    licences = [("a", f"Copyright (c) A\n{body}"), ("b", f"Copyright (c) B\n\n{body}")]
    assert choose_documents(licences, 10_000) == licences[:1]


def test_the_corpus_is_without_this_project_whose_pages_change_with_every_commit(tmp_path):
    names = [name.partition("/")[2].partition("/")[0] for name, _ in embedded.package_texts()]
    assert "numpy" in names and not [name for name in names if "apex" in name]
    for name in ("apex_composer/a.py", "__editable___apex_composer_0_1_0_finder.py", "other/a.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n" * embedded.SMALLEST_DOCUMENT)
    found = [path.relative_to(tmp_path).as_posix() for path in embedded._python_files(tmp_path)]
    assert found == ["other/a.py"]


def test_tiny_and_huge_documents_are_left_out():
    good = "x" * embedded.SMALLEST_DOCUMENT
    given = [("tiny", "y"), ("huge", "z" * (embedded.LARGEST_DOCUMENT + 1)), ("good", good)]
    assert choose_documents(given, 10**9) == [("good", good)]


def test_docstrings_stand_under_the_name_of_what_they_document():
    prose = "words, " * 50 + "and the end."
    text = module_docstrings(f'def area(side):\n    """{prose}"""\ndef f():\n    """Short."""\n')
    assert text == f"area\n\n{prose}"
    assert module_docstrings("not python (") == ""


def test_every_source_of_the_standard_library_is_outside_its_tests():
    names = [name for name, _ in embedded.standard_library_sources()]
    assert "stdlib/argparse.py" in names
    assert not any("/test/" in name or "site-packages" in name for name in names), sys.version
