import gzip
import io
import json
import random
import struct
import zlib

import pytest
from corpus import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from reading import read, reasons, texts

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.lines import Gunzipped
from apex_composer.data_prep.read.sources import find_sources


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_compression_reads_the_same(tmp_path, suffix):
    given = ["one", "zwei\n\u2028\x85", "drei \U0001f600", "\x00"]
    documents, rejects = read(write_jsonl(tmp_path / f"x.{suffix}", given))
    assert [document.text for document in documents] == given
    assert {document.domain for document in documents} == {"book"} and not rejects


def test_lines_are_counted_with_blank_ones(tmp_path):
    lines = ["one", b"", "two"]
    plain = write_jsonl(tmp_path / "x.jsonl", lines)
    assert [document.line for document in read(plain)[0]] == [1, 3]
    assert [document.stop for document in read(plain)[0]][1] == plain.stat().st_size
    packed = write_jsonl(tmp_path / "x.jsonl.zst", lines)
    assert [document.line for document in read(packed)[0]] == [1, 3]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_archives_of_several_frames_are_read_whole(tmp_path, suffix):
    frames = [
        write_jsonl(tmp_path / f"{i}.{suffix}", [f"{i} {j}" for j in range(i * 50)]).read_bytes()
        for i in range(1, 5)
    ]
    both = tmp_path / f"all.{suffix}"
    both.write_bytes(b"".join(frames))
    assert texts(both) == [f"{i} {j}" for i in range(1, 5) for j in range(i * 50)]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("kept", [0, 1, 5, 0.3, 0.9, -1])
def test_a_cut_archive_is_an_error_that_names_file_and_line(tmp_path, suffix, kept):
    # Random text does not compress, so that cuts fall between lines that were already read.
    words = random.Random(0)
    path = write_jsonl(tmp_path / f"x.{suffix}", [words.randbytes(4000).hex() for _ in range(400)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(SourceError, match=rf"x\.{suffix} cannot be (read|opened)"):
        read(path)
    if kept == 0.9:
        with pytest.raises(SourceError, match=r"after line [23]\d\d"):
            read(path)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_damaged_archive_never_yields_other_text_in_silence(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"x.{suffix}", [str(i) * 50 for i in range(2000)])
    good, whole = texts(path), path.read_bytes()
    for seed in range(20):
        damaged = bytearray(whole)
        damaged[random.Random(seed).randrange(len(whole))] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = texts(path)
        except SourceError:
            continue
        # zstd without checksums cannot see a changed literal; gzip always can.
        assert found == good or suffix == "jsonl.zst"


FEW = gzip.compress(b'{"text": "a"}\n' * 50)
MANY = gzip.compress(random.Random(0).randbytes(300_000))
BARE = zlib.compress(b"abc\n")[2:-4]  # as deflate alone has it
SUMS = struct.pack("<II", zlib.crc32(b"abc\n"), 4)
# Every part that a member may have, and what archives are followed by.
ARCHIVES = {
    "two members": FEW + MANY + FEW,
    "an empty member": gzip.compress(b"") + FEW,
    "only an empty member": gzip.compress(b""),
    "zeros behind": FEW + bytes(10),
    "many zeros behind": FEW + bytes(1_000_000),
    "zeros between": FEW + bytes(600_000) + FEW,
    "only zeros": bytes(100),
    "garbage behind": FEW + b"garbage" * 10,
    "a line behind": FEW + b"\n",
    "zeros and garbage behind": FEW + bytes(10) + b"garbage" * 10,
    "half a header behind": FEW + FEW[:5],
    "name": b"\x1f\x8b\x08\x08" + bytes(6) + b"name\0" + BARE + SUMS,
    "extra field": b"\x1f\x8b\x08\x04" + bytes(6) + b"\x03\0abc" + BARE + SUMS,
    "comment": b"\x1f\x8b\x08\x10" + bytes(6) + b"comment\0" + BARE + SUMS,
    "text": b"\x1f\x8b\x08\x01" + bytes(6) + BARE + SUMS,
    "unknown method": b"\x1f\x8b\x07\0" + bytes(6) + BARE + SUMS,
    "wrong sum": b"\x1f\x8b\x08\0" + bytes(6) + BARE + bytes(4) + SUMS[4:],
    "wrong length": b"\x1f\x8b\x08\0" + bytes(6) + BARE + SUMS[:4] + bytes(4),
    "no sums": b"\x1f\x8b\x08\0" + bytes(6) + BARE,
    "no archive": b'{"text": "a"}\n',
}


def content(decompressed, *errors):
    """What a reader makes of an archive, None where it is damaged."""
    try:
        return decompressed.read()
    except errors:
        return None


def check_reading(archive):
    expected = content(gzip.GzipFile(fileobj=io.BytesIO(archive)), EOFError, OSError, zlib.error)
    found = content(io.BufferedReader(Gunzipped(io.BytesIO(archive))), EOFError, OSError)
    assert found == expected


@pytest.mark.parametrize("archive", ARCHIVES.values(), ids=ARCHIVES)
def test_gzip_is_read_as_python_reads_it(archive):
    check_reading(archive)


def test_so_is_what_is_cut_or_damaged_anywhere():
    two = FEW + gzip.compress(random.Random(0).randbytes(200).hex().encode())
    for place in range(len(two)):
        check_reading(two[:place])
        check_reading(two[:place] + bytes([two[place] ^ 0x10]) + two[place + 1 :])


def test_damage_that_only_isal_knows_by_name_is_told_as_any_other(tmp_path):
    path = write_jsonl(tmp_path / "book" / "x.jsonl.gz", ["one"] * 9)
    path.write_bytes(path.read_bytes()[:12] + b"\xff" * 50)
    with pytest.raises(SourceError, match=r"x\.jsonl\.gz cannot be read at its beg.* damaged"):
        read(path)
    with pytest.raises(SourceError, match=r"x\.jsonl\.gz cannot be read at its first line"):
        find_sources(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 10)
    with pytest.raises(SourceError, match=rf"{name} cannot be read at its beginning"):
        read(tmp_path / name)


def test_the_limit_is_exact_and_the_last_line_needs_no_end(tmp_path):
    line = b'{"text": "abc"}'
    path = tmp_path / "x.jsonl"
    for content in (line, line + b"\n", b"\xef\xbb\xbf" + line):
        path.write_bytes(content)
        assert texts(path) == ["abc"]
    path.write_bytes(line + b"\n" + line + b" \n" + line)
    documents, rejects = read(path, line_limit=len(line))
    assert [document.line for document in documents] == [1, 3]
    assert rejects == [(2, "too long", '{"text": "abc"}')]
    path.write_bytes(line + b" ")
    assert reasons(path, line_limit=len(line)) == ["too long"]


def test_a_plain_file_that_was_cut_short_says_so(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "abc"}\n{"text": "ab')
    assert reasons(path) == ["cut short at the end of the file"]


GOOD_OR_BAD = st.one_of(
    st.text(max_size=12), st.sampled_from([b"", b"bad", b" ", b'{"text": "\xff"}', b'{"te'])
)


@given(
    lines=st.lists(GOOD_OR_BAD, max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    has_end=st.booleans(),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
)
def test_every_line_is_read_once_wherever_the_file_is_cut(
    tmp_path_factory, lines, cuts, has_end, end
):
    path = tmp_path_factory.mktemp("cuts") / "x.jsonl"
    encoded = [
        line if isinstance(line, bytes) else json.dumps({"text": line}).encode() for line in lines
    ]
    path.write_bytes(end.join(encoded) + (end if has_end else b""))
    whole = read(path, line_limit=20)
    edges = sorted({0, *cuts})
    before, documents, rejects = 0, [], []
    for start, stop in zip(edges, [*edges[1:], None], strict=True):
        ends = []
        part = read(path, start, stop, line_limit=20, on_end=ends.append)
        documents += [(before + d.line, d.text, d.stop) for d in part[0]]
        rejects += [(before + line, *reject) for line, *reject in part[1]]
        before += ends[0]
    assert documents == [(d.line, d.text, d.stop) for d in whole[0]]
    assert rejects == whole[1]
