import gzip
import json

import prep_reading
import pytest
from prep_reading import SIDES, compare, cut_texts, measure, write_files

from apex_composer.data_prep.read import lines
from apex_composer.data_prep.read.records import parse_line


def test_both_sides_read_every_text(tmp_path):
    texts = cut_texts({"a": ["one two", "   "], "b": ["é" * 9]}, size=5)
    assert texts == ["one t", "wo", "é" * 5, "é" * 4]
    for source in write_files(texts, tmp_path).values():
        for side in SIDES:
            assert measure(source, side)[1] == 16
        found = compare(source, rounds=2, megabytes=18e-6)
        assert found.keys() > {*SIDES} and found["ratio_median"] > 0


def test_before_is_json_and_gzip_and_ends_with_the_block(monkeypatch, tmp_path):
    calls = []
    for module, name in ((json, "loads"), (gzip, "GzipFile")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, own=own, **k: calls.append(own) or own(*a, **k)
        )
    source = write_files(["one"], tmp_path)["gzip"]
    measure(source, "now")
    assert not calls and lines.parse_line is parse_line
    measure(source, "before")
    assert len(calls) == 2 and lines.parse_line is parse_line


def test_a_side_that_reads_something_else_is_an_error(monkeypatch, tmp_path):
    source = write_files(["one"], tmp_path)["plain"]
    monkeypatch.setattr(prep_reading, "measure", lambda _, side: (1.0, len(side)))
    with pytest.raises(RuntimeError, match="the sides read different texts"):
        compare(source, 2, 1.0)
