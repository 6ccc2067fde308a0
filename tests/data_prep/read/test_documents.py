import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from corpus import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import Source, find_sources


def source_of(path, domain="book", format="jsonl"):
    plain = path.suffix == ".jsonl"
    return Source(str(path), domain, format, path.stat().st_size, splittable=plain)


def read(path, start=0, stop=None, domain="book", format="jsonl", **options):
    """Documents and rejects of one file."""
    rejects = []
    documents = read_documents(
        source_of(path, domain, format),
        start,
        stop,
        lambda place, reason, excerpt, domain: rejects.append((place, reason, excerpt)),
        **options,
    )
    return list(documents), rejects


def texts(path, **options):
    return [document.text for document in read(path, **options)[0]]


def reasons(path, **options):
    return [reason for _, reason, _ in read(path, **options)[1]]


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


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 10)
    with pytest.raises(SourceError, match=rf"{name} cannot be read at its beginning"):
        read(tmp_path / name)


def test_a_file_that_has_gone_is_an_error_that_names_it(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["one"])
    documents = read_documents(source_of(path), 0, None, print)
    path.unlink()
    with pytest.raises(SourceError, match="x.jsonl"):
        next(documents)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "broken JSON"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "invalid UTF-8"),
        (b'{"text": null}', "no text"),
        (b'{"text": 17}', "no text"),
        (b'{"text": ["a"]}', "no text"),
        (b'{"meta": {}}', "no text"),
        (b'"text"', "no text"),
        (b"null", "no text"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t\\u00a0"}', "empty text"),
        (b'{"text": "%s"}' % (b"x" * 200_000), "too long"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
def test_bad_lines_are_rejected_with_place_reason_and_excerpt(tmp_path, line, reason, suffix):
    path = write_jsonl(tmp_path / f"x.{suffix}", ["good", line, b"  \r", "also good"])
    documents, rejects = read(path, line_limit=150_000)
    assert [document.text for document in documents] == ["good", "also good"]
    [(place, found, excerpt)] = rejects
    assert found == reason and excerpt and len(excerpt) <= 200
    assert place == 2


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


def test_an_error_of_the_caller_is_not_blamed_on_the_file(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [b"bad"])

    def fail(*_):
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        list(read_documents(source_of(path), 0, None, fail))
    assert not isinstance(caught.value, SourceError)


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


def test_an_archive_has_no_byte_ranges(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl.gz", ["one"])
    with pytest.raises(ValueError, match="cannot be split: start=5"):
        read(path, 5, None)


def test_v2_keeps_its_text_in_another_field(tmp_path):
    path = tmp_path / "en_head.json.gz"
    rows = [{"raw_content": "web", "text": "not this", "language": "en"}, {"text": "no"}]
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    assert texts(path, format="redpajama-v2") == ["web"]
    assert reasons(path, format="redpajama-v2") == ["no text"]


def test_slimpajama_names_the_domain_in_every_record(tmp_path):
    names = ["RedPajamaCommonCrawl", "RedPajamaGithub", "RedPajamaStackExchange", "RedPajamaArXiv"]
    rows = [{"text": name, "meta": {"redpajama_set_name": name}} for name in names]
    rows += [{"text": "a", "meta": {}}, {"text": "b", "meta": {"redpajama_set_name": "../x"}}]
    path = write_jsonl(tmp_path / "x.jsonl.zst", [json.dumps(row).encode() for row in rows])
    documents, rejects = read(path, domain=None, format="slimpajama")
    assert [document.domain for document in documents] == ["cc", "github", "stackexchange", "arxiv"]
    assert [reason for _, reason, _ in rejects] == ["unknown domain"] * 2


def test_a_reject_has_the_domain_that_its_record_shows(tmp_path):
    meta = {"redpajama_set_name": "RedPajamaGithub"}
    rows = [{"text": "good", "meta": meta}, {"text": None, "meta": meta}, {"text": ""}]
    lines = [json.dumps(row).encode() for row in rows] + [b"broken"]
    source = source_of(write_jsonl(tmp_path / "x.jsonl.zst", lines), None, "slimpajama")
    found = []
    assert len(list(read_documents(source, 0, None, lambda *reject: found.append(reject)))) == 1
    assert [(place, domain) for place, _, _, domain in found] == [
        (2, "github"),
        (3, None),
        (4, None),
    ]


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
    write_parquet(path, {"txt": ["a"]})
    with pytest.raises(SourceError, match="no column 'text'"):
        read(path, domain=None, format="redpajama-sample")
