import gzip
import json

import pytest
from corpus import write_jsonl
from reading import read, reasons, source_of, texts

from apex_composer.data_prep.read.documents import read_documents


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
