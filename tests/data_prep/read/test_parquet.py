import json
import random
from contextlib import suppress

import pyarrow
import pyarrow.parquet
import pytest
from reading import read

from apex_composer.data_prep.errors import SettingsError, SourceError
from apex_composer.data_prep.read import parquet
from apex_composer.data_prep.read.sources import find_sources


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.table(rows), path, **options)
    return path


def test_the_samples_parquet_mirror(tmp_path):
    meta = [
        json.dumps({"pred_label": "__label__wiki", "source": "cc/2019-30"}),
        "{'content_hash': 'a', 'language': [{'name': 'C', 'bytes': '1'}]}",
        json.dumps({"timestamp": "x", "source": "c4", "language": "en", "url": "u"}),
        "garbage",
    ]
    rows = {"text": ["one", "two", "three", "four"], "meta": meta, "other": [1, 2, 3, 4]}
    path = write_parquet(tmp_path / "x.parquet", rows, row_group_size=2)
    documents, rejects = read(path, domain=None, format="redpajama-sample")
    assert [document[:3] for document in documents] == [
        (1, "cc", "one"), (2, "github", "two"), (3, "c4", "three"),
    ]  # fmt: skip
    assert [(place, reason) for place, reason, _ in rejects] == [(4, "unknown domain")]


def test_bad_rows_of_parquet(tmp_path):
    broken = pyarrow.array([b"good", b"\xff\xfe", None, b"", b"x" * 99]).cast(
        pyarrow.string(), safe=False
    )
    path = write_parquet(tmp_path / "x.parquet", {"text": broken, "meta": ["{'yymm': '1'}"] * 5})
    documents, rejects = read(path, domain=None, format="redpajama-sample", line_limit=50)
    assert [document[:3] for document in documents] == [(1, "arxiv", "good")]
    found = [(place, reason) for place, reason, _ in rejects]
    assert found == [(2, "invalid UTF-8"), (3, "no text"), (4, "empty text"), (5, "too long")]


def test_damaged_parquet_is_an_error_that_names_the_file(tmp_path):
    words = random.Random(0)
    rows = {"text": [words.randbytes(3000).hex() for _ in range(500)], "meta": ["{}"] * 500}
    path = write_parquet(tmp_path / "x.parquet", rows, row_group_size=100, compression="zstd")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 :: 997] = b"\x00" * len(damaged[len(damaged) // 2 :: 997])
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="x.parquet cannot be read"):
        read(path, domain=None, format="redpajama-sample")


def test_whatever_is_damaged_ends_in_text_or_in_an_error_that_names_the_file(tmp_path):
    rows = {"text": ["one", "two"], "n": pyarrow.array([1, 2], pyarrow.int32())}
    path = write_parquet(tmp_path / "x.parquet", rows)
    whole, faults = path.read_bytes(), 0
    for place in range(len(whole) - 240, len(whole)):  # of what describes the columns
        path.write_bytes(whole[:place] + b"g" + whole[place + 1 :])
        try:
            with suppress(SettingsError):  # these columns show no format
                find_sources(tmp_path)
            assert len(read(path, format="fineweb")[0]) <= 2
        except SourceError as error:
            assert str(path) in str(error)
            faults += 1
    assert faults > 20


def test_times_that_python_does_not_know_are_an_error_that_names_the_file(tmp_path):
    rows = {"text": ["one"], "meta": pyarrow.array([2**62], pyarrow.timestamp("us"))}
    path = write_parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(SourceError, match="x.parquet cannot be read.*date value out of range"):
        read(path, format="redpajama-sample")
    assert len(read(path, format="fineweb")[0]) == 1


def test_checksums_of_pages_are_compared(tmp_path):
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    rows = {"text": ["plain text"] * 9}
    path = write_parquet(tmp_path / "x.parquet", rows, write_page_checksum=True, **plain)
    assert len(read(path, format="fineweb")[0]) == 9
    path.write_bytes(path.read_bytes().replace(b"plain text", b"other text", 1))
    with pytest.raises(SourceError, match="x.parquet cannot be read.*[Cc][Rr][Cc]"):
        read(path, format="fineweb")


def test_columns_that_hold_no_text_are_an_error_that_names_them(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"txt": ["a"], "id": [1]})
    for format in ("redpajama-sample", "fineweb"):
        with pytest.raises(SourceError, match=r"no column 'text'; .* \['txt', 'id'\]\.$"):
            read(path, format=format)
    write_parquet(path, {"text": [b"a"]})
    with pytest.raises(SourceError, match=r"'text' holds binary, not string\.$"):
        read(path, format="fineweb")
    for name, said in (("text", r"more than one column 'text'"), ("meta", "meta")):
        columns = [pyarrow.array([text]) for text in "abc"]
        twice = pyarrow.table(columns, names=["text", name, name])
        pyarrow.parquet.write_table(twice, path)
        with pytest.raises(SourceError, match=f"x.parquet cannot be read.*{said}"):
            read(path, format="redpajama-sample")


def test_of_fineweb_the_text_alone_is_read(tmp_path):
    more = {"meta": [{"a": [n]} for n in range(3)], "source": pyarrow.array(["\xff"] * 3)}
    path = write_parquet(tmp_path / "x.parquet", {**more, "text": ["one", None, "three"]})
    documents, rejects = read(path, domain="en", format="fineweb")
    assert [document[:3] for document in documents] == [(1, "en", "one"), (3, "en", "three")]
    assert rejects == [(2, "no text", "{}")]


def test_texts_that_are_stored_once_are_read_and_limited_as_others(tmp_path):
    text = pyarrow.array(["one", "x" * 99, None, "one"]).dictionary_encode()
    documents, rejects = read(
        write_parquet(tmp_path / "x.parquet", {"text": text}), format="fineweb", line_limit=50
    )
    assert [document[:3:2] for document in documents] == [(1, "one"), (4, "one")]
    assert [(place, reason) for place, reason, _ in rejects] == [(2, "too long"), (3, "no text")]


def test_pages_of_parquet_beyond_the_memory_of_a_worker_are_refused(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", {"text": [str(n) * 1_000_000 for n in range(8)]})
    monkeypatch.setattr(parquet, "PAGE_LIMIT", 9_000_000)
    assert len(read(path)[0]) == 8
    monkeypatch.setattr(parquet, "PAGE_LIMIT", 7_000_000)
    with pytest.raises(SourceError, match="rows have 1 MB on average.*row groups of fewer rows"):
        read(path)
    # Distinct texts of all rows stand in one page where the writer sets it no limit.
    few = {"text": [str(n) * 1000 for n in range(10)] * 300}
    assert len(read(write_parquet(path, few))[0]) == 3000
    many = {"text": [f"{n:04}" * 1000 for n in range(2000)] * 2}
    write_parquet(path, many, dictionary_pagesize_limit=1 << 30)
    with pytest.raises(SourceError, match="0 MB on average, and pages of 8 MB would not fit"):
        read(path)
    # What is not read, such as pictures beside the text, takes no memory.
    rows = {"text": ["one", "two"], "image": [{"bytes": bytes(5_000_000)}] * 2}
    path = write_parquet(tmp_path / "x.parquet", rows, use_dictionary=False)
    assert len(read(path, format="fineweb")[0]) == 2
