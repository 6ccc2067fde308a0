import gzip
import json
import sys

import pytest
from corpus import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from reading import read, reasons, source_of, texts

from apex_composer.data_prep.errors import Rejected
from apex_composer.data_prep.read import records
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.records import (
    MOST_DIGITS,
    MOST_LEVELS,
    parse_line,
    parse_with_json,
    take_document,
)


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


def by_json_alone(line):
    """What `parse_line` was before orjson, but for the integers beyond 64 bits."""
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError:
        raise Rejected("invalid UTF-8") from None
    except ValueError:
        cut = "cut short at the end of the file"
        raise Rejected("broken JSON" if line.endswith(b"\n") else cut) from None
    if not isinstance(record, dict):
        raise Rejected("no text")
    return records.LooseRecord(record)


def outcomes(parse, line):
    """What becomes of a line in every format, with a domain and without."""
    for file_format in ("jsonl", "slimpajama", "redpajama-v2", "redpajama-sample"):
        for domain in ("book", None):
            try:
                yield take_document(parse(line), file_format, domain)
            except Rejected as rejected:
                yield str(rejected), rejected.domain


def check_one_outcome(line):
    expected = list(outcomes(parse_with_json, line))
    assert list(outcomes(parse_line, line)) == expected
    assert list(outcomes(by_json_alone, line)) == expected
    try:
        record = parse_with_json(line)
    except Rejected:
        return
    assert repr(parse_line(line)) == repr(record)


# Values and other parts of a line that readers of JSON disagree about.
ODD_VALUES = [
    b"NaN", b"-NaN", b"nan", b"Infinity", b"-Infinity", b"inf", b"1e999", b"-1e999", b"1e-999",
    b"18446744073709551615", b"18446744073709551616", b"-9223372036854775808", b"1E05", b"-0",
    b"-9223372036854775809", b"9" * 400, b"-" + b"1" * 309, b"1" + b"0" * 5000 + b"e-4990",
    b"0." + b"1" * 9000, b"01", b"-01", b"1.", b".5", b"+1", b"-", b"0x1", b"1_0", b"1.e5",
    b"\xd9\xa1", b'"\\ud800"', b'"\\udc00 "', b'"\\ud83d\\ude00"', b'"\\ude00\\ud83d"',
    b'"\\ud83d\\u0041"', b'"\\uD800"', b'"\\u00e"', b'"\\x41"', b'"\\U0041"', b'"\\/"', b'"\\\\"',
    b'"\\"', b'"\\u0000"', b'"\x00"', b'"\x01"', b'"\t"', b'"\n"', b'"\x7f"',
    b'"\xc2\x85 \xe2\x80\xa8"', b"'a'", b'""', b'" "', b'"\xff"', b'"\xed\xa0\x80"',
    b'"\xc0\x80"', b'"\xf4\x90\x80\x80"', b'"\xf0\x9f\x98\x80"', b"tru", b"true", b"null", b"{}",
    b"[1,]", b"[" * 50 + b"]" * 50, b'{"\\ud800": 1}', b'{"a": 1, "a": 2}',
    b'{"redpajama_set_name": "RedPajamaGithub"}', b'{"redpajama_set_name": "\\ud800"}',
    b'{"source": "c4"}', b'"{\\"source\\": \\"c4\\"}"', b'"a"', b"1", b"[]", b"/*c*/1", b"",
]  # fmt: skip
ODD_LINES = [
    b"%s", b"\xef\xbb\xbf%s", b"\xef\xbb\xbf\xef\xbb\xbf%s", b"%s\x00", b"\x0c%s", b"%s\x0c",
    b"\xc2\xa0%s", b" \t\r%s \r", b"%s,", b"%s %s", b"%s//c", b"%s\xff", b"\xff\xfe%s", b"%s]",
    b"[%s]",
]  # fmt: skip
ODD_RECORDS = [
    b'{"text": %s}', b'{"text": "a", "meta": %s}', b'{"text": "a", "text": %s}',
    b'{"text": %s, "text": "a"}', b'{"raw_content": %s, "text": "b"}',
    b'{"meta": {"source": "c4"}, "text": %s}', b'{"text": "a", %s: 1}', b'{"text": "a" %s}',
    b'{"text": "a", "meta": %s,}', b'{text: %s}',
]  # fmt: skip


def test_orjson_and_json_read_the_same_of_odd_lines():
    for value in ODD_VALUES:
        for record in ODD_RECORDS:
            check_one_outcome(record.replace(b"%s", value) + b"\n")
        for line in ODD_LINES:
            check_one_outcome(line.replace(b"%s", value))  # with no end it is called cut short
            check_one_outcome(line.replace(b"%s", b'{"text": %s}' % value) + b"\n")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 70), 1 << 70),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["\ud800", "a\udc00 ", "\udc00\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["text", "meta", "raw_content", "red_pajama_subset", "title", "\ud800"])


@given(
    record=st.dictionaries(NAMES, JSON, max_size=4),
    ascii_only=st.booleans(),
    splices=st.lists(
        st.tuples(
            st.floats(0, 1), st.integers(0, 2), st.sampled_from([*ODD_VALUES, b'"', b":", b"\\"])
        ),
        max_size=2,
    ),
)
def test_orjson_and_json_read_the_same_of_any_line(record, ascii_only, splices):
    line = json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    for place, dropped, odd in splices:
        start = int(place * len(line))
        line = line[:start] + odd + line[start + dropped :]
    check_one_outcome(line + b"\n")


def at_depth(frames, call):
    return at_depth(frames - 1, call) if frames else call()


def nested(levels, opened, closed, before=b""):
    """A record of so many levels; what is nested comes twice, and the second hides the first."""
    inner = opened * (levels - 1) + b"1" + closed * (levels - 1)
    return b'{"text": "a", %s"x": %s, "x": 1}\n' % (before, inner)


@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a": ', b"}")])
@pytest.mark.parametrize("before", [b"", b'"n": NaN, '], ids=["orjson", "json"])
@pytest.mark.parametrize("frames", [0, 700])
def test_the_deepest_nesting_is_the_same_for_both_and_at_any_depth_of_the_stack(
    brackets, before, frames
):
    limit = sys.getrecursionlimit()
    for parse in (parse_line, parse_with_json):
        line = nested(MOST_LEVELS, *brackets, before)
        assert at_depth(frames, lambda: parse(line))["text"] == "a"  # noqa: B023
        line = nested(MOST_LEVELS + 1, *brackets, before)
        with pytest.raises(Rejected, match="broken JSON"):
            at_depth(frames, lambda: parse(line))  # noqa: B023
    assert sys.getrecursionlimit() == limit


def test_brackets_in_a_text_are_no_nesting():
    for text in ("[{" * 3000, '"[' * 3000, '\\"[{' * 3000, "\\[" * 3000, '[\\\\"' * 3000):
        line = json.dumps({"": text, "n": float("nan"), "text": text}).encode()
        assert parse_line(line)["text"] == parse_with_json(line)["text"] == text


@pytest.mark.parametrize("sign", [b"", b"-"])
def test_the_longest_integer_is_the_same_for_both(sign):
    for parse in (parse_line, parse_with_json):
        line = b'{"text": "a", "n": %s%s}\n'
        assert parse(line % (sign, b"9" * MOST_DIGITS))["text"] == "a"
        with pytest.raises(Rejected, match="broken JSON"):
            parse(line % (sign, b"9" * (MOST_DIGITS + 1)))


def test_a_line_too_long_for_orjson_is_read_by_json(monkeypatch):
    line = b'{"text": "a"}\n'
    assert type(parse_line(line)) is dict
    monkeypatch.setattr(records, "MOST_FOR_ORJSON", len(line) - 1)
    assert parse_line(line) == {"text": "a"} and type(parse_line(line)) is not dict


def test_half_of_a_pair_matters_in_the_text_only(tmp_path):
    lines = [b'{"text": "a", "meta": "\\ud800"}', b'{"text": "\\ud800", "meta": "a"}']
    documents, rejects = read(write_jsonl(tmp_path / "x.jsonl", lines))
    assert [document.text for document in documents] == ["a"]
    assert [(line, reason) for line, reason, _ in rejects] == [(2, "invalid UTF-8")]
