import random

import datasets
import numpy as np
import pyarrow
import pytest
from hub_folders import write_arrow
from reading import read, reasons, texts

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read import arrow
from apex_composer.data_prep.read.arrow import count_rows, read_arrow

TEXTS = [f"{n} ä\n\U0001f600" for n in range(20)]
LARGE, DICTIONARY = pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())


@pytest.mark.parametrize("format", ["stream", "file"])
@pytest.mark.parametrize("kind", [pyarrow.string(), LARGE, DICTIONARY, pyarrow.string_view()])
def test_every_kind_of_text_reads_the_same(tmp_path, format, kind):
    label = pyarrow.array(["a", "b"] * 10).dictionary_encode()  # dictionaries of columns not read
    nested = [{"url": "u", "tags": [n]} for n in range(20)]
    columns = {"label": label, "text": pyarrow.array(TEXTS).cast(kind), "metadata": nested}
    path = write_arrow(tmp_path / "x.arrow", columns, format=format)
    documents, rejects = read(path, format="arrow")
    assert [document[:3] for document in documents] == [
        (number + 1, "book", text) for number, text in enumerate(TEXTS)
    ]
    assert not rejects and count_rows(path) == 20


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_batches_are_read(tmp_path, codec):
    table = pyarrow.table({"other": range(20), "text": TEXTS})
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema, options=options) as out:
        out.write_table(table, 3)
    assert texts(tmp_path / "x.arrow", format="arrow") == TEXTS


def test_bad_rows_are_rejected_with_their_number(tmp_path):
    broken = pyarrow.array([b"good", b"\xff\xfe", None, b" ", b"x" * 99, b"also good"])
    for kind in (pyarrow.string(), LARGE):
        rows = {"text": broken.cast(kind, safe=False)}
        path = write_arrow(tmp_path / "x.arrow", rows, batch=2)
        documents, rejects = read(path, format="arrow", line_limit=50)
        assert [document[:3:2] for document in documents] == [(1, "good"), (6, "also good")]
        assert [(place, reason) for place, reason, _ in rejects] == [
            (2, "invalid UTF-8"), (3, "no text"), (4, "empty text"), (5, "too long"),
        ]  # fmt: skip
    write_arrow(path, {"text": pyarrow.nulls(2)})
    assert reasons(path, format="arrow") == ["no text"] * 2


@pytest.mark.parametrize("format", ["stream", "file"])
def test_a_file_cut_anywhere_is_an_error_never_a_shorter_corpus(tmp_path, format):
    path = write_arrow(tmp_path / "x.arrow", {"text": TEXTS}, format=format)
    whole = path.read_bytes()
    for kept in range(0, len(whole), 8):  # among them the ends of batches
        path.write_bytes(whole[:kept])
        with pytest.raises(SourceError, match=r"x\.arrow cannot be read (at its|after row).*cut"):
            read(path, format="arrow")
    path.write_bytes(whole + b"\x00" * 8)
    with pytest.raises(SourceError, match=r"x\.arrow cannot be read"):
        read(path, format="arrow")


def test_positions_that_lead_out_of_the_file_are_an_error_not_a_crash(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", {"text": TEXTS}, batch=20)
    positions = np.cumsum([0] + [len(text.encode()) for text in TEXTS]).astype("<i4").tobytes()
    whole = path.read_bytes()
    assert whole.count(positions) == 1
    for number in (1, 10, 20):
        damaged = bytearray(whole)
        damaged[whole.index(positions) + 4 * number + 3] = 0x7F
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="damaged or cut short"):
            read(path, format="arrow")


@pytest.mark.parametrize("format", ["stream", "file"])
def test_whatever_is_damaged_ends_in_text_or_in_an_error_that_names_the_file(tmp_path, format):
    columns = {"text": TEXTS, "other": [{"n": [n]} for n in range(20)]}
    path = write_arrow(tmp_path / "x.arrow", columns, format=format)
    whole, faults, dice = path.read_bytes(), 0, random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            documents, rejects = read(path, format="arrow")
            assert len(documents) + len(rejects) <= 20
        except SourceError as error:
            assert str(path) in str(error)
            faults += 1
    assert faults > 50  # arrow has no checksums: a changed letter, or what is not read, is no fault


def test_other_columns_and_other_files_are_errors_that_say_what_is_there(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", {"content": ["a"], "id": [1]})
    with pytest.raises(SourceError, match=r"no column 'text'.*\['content', 'id'\]\.$"):
        read(path, format="arrow")
    write_arrow(path, {"text": [["a"]]})
    with pytest.raises(SourceError, match=r"'text' holds list<.*>, not string\.$"):
        read(path, format="arrow")
    column = pyarrow.array(["a"])
    for format in ("stream", "file"):
        twice = pyarrow.table([column, column], names=["text", "text"])
        write_arrow(path, twice, format=format)
        with pytest.raises(SourceError, match="more than one column 'text'"):
            read(path, format="arrow")
    path.write_bytes(b'{"text": "a"}\n' * 10)
    with pytest.raises(SourceError, match="x.arrow cannot be read at its beginning"):
        read(path, format="arrow")


@pytest.mark.parametrize("format", ["stream", "file"])
def test_text_that_was_read_does_not_stay_in_memory(tmp_path, monkeypatch, format):
    monkeypatch.setattr(arrow, "TEXT_MAPPED", 1_000_000)
    rows = [f"{n} " + "x" * 400_000 for n in range(100)]
    path = write_arrow(
        tmp_path / "x.arrow", {"other": rows, "text": rows}, batch=100, format=format
    )
    mapped, before = [], pyarrow.total_allocated_bytes()
    for row in read_arrow(path, 10**6):
        assert row.record["text"] == rows[row.number - 1]
        if row.number % 10 == 0:
            mapped.append(_resident_megabytes(path))
            assert pyarrow.total_allocated_bytes() - before < 1_000_000  # nothing is copied
    assert 0 < max(mapped) < 10  # of 80


def _resident_megabytes(path) -> float:
    """What of a mapped file is in this process's memory."""
    with open("/proc/self/smaps") as file:
        lines = file.read().split(str(path))[1].splitlines()
    [resident] = [line.split()[1] for line in lines if line.startswith("Rss:")][:1]
    return int(resident) / 1e3


def test_what_datasets_writes_is_read(tmp_path):
    datasets.Dataset.from_dict({"id": range(20), "text": TEXTS}).save_to_disk(str(tmp_path / "x"))
    [path] = (tmp_path / "x").glob("*.arrow")
    assert texts(path, format="arrow") == TEXTS
