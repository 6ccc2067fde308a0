import gzip
import json

import pytest
from apex_composer.data_prep.readers import ReadReport, find_files, parse_line, read_documents
from corpus import write_corpus, write_jsonl


def read(path):
    report = ReadReport()
    return list(read_documents(path, report)), report


def test_domains_are_the_first_folders_and_files_are_sorted(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "github" / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "x.jsonl", ["hidden"])
    files = find_files(tmp_path)
    assert list(files) == ["book", "github"]
    names = [path.relative_to(tmp_path).as_posix() for path in files["github"]]
    assert names == ["github/b.jsonl.gz", "github/deep/a.jsonl.zst"]


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .jsonl"):
        find_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_files(tmp_path / "absent")


def test_files_outside_a_domain_are_refused(tmp_path):
    write_jsonl(tmp_path / "loose.jsonl", ["text"])
    with pytest.raises(ValueError, match="outside a domain folder"):
        find_files(tmp_path)


def test_domain_names_must_be_usable_as_labels(tmp_path):
    write_jsonl(tmp_path / "a b" / "x.jsonl", ["text"])
    with pytest.raises(ValueError, match="a b"):
        find_files(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_compression_reads_the_same(tmp_path, suffix):
    texts = ["one", "zwei\n\u2028\x85", "drei \U0001f600"]
    documents, report = read(write_jsonl(tmp_path / f"x.{suffix}", texts))
    assert documents == texts
    assert report.documents == 3 and not report.rejects


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_archives_of_several_frames_are_read_whole(tmp_path, suffix):
    first = write_jsonl(tmp_path / f"a.{suffix}", ["one"]).read_bytes()
    second = write_jsonl(tmp_path / f"b.{suffix}", ["two"]).read_bytes()
    both = tmp_path / f"c.{suffix}"
    both.write_bytes(first + second)
    assert read(both)[0] == ["one", "two"]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_cut_archive_is_an_error_that_names_the_file(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"x.{suffix}", [str(i) for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=rf"x.{suffix} cannot be read after line"):
        read(path)


def test_a_file_that_is_no_archive_is_an_error_that_names_it(tmp_path):
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        (tmp_path / name).write_bytes(b'{"text": "plain"}\n')
        with pytest.raises(OSError, match=f"{name} cannot be read"):
            read(tmp_path / name)


def test_a_damaged_gzip_member_is_an_error_that_names_the_file(tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "abc"}\n' * 500))
    packed[20:40] = b"\0" * 20
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    with pytest.raises(OSError, match="x.jsonl.gz cannot be read"):
        read(tmp_path / "x.jsonl.gz")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "invalid UTF-8"),
        (b'{"text": null}', "no text"),
        (b'{"raw_content": "x"}', "no text"),
        (b'["text"]', "no text"),
        (b'{"text": 3}', "no text"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n"}', "empty text"),
    ],
)
def test_bad_lines_have_a_reason(line, reason):
    assert parse_line(line) == (None, reason)


@pytest.mark.parametrize("meta", [{"language": "en"}, {"language": [{"name": "C"}]}, "{}", None])
def test_meta_may_be_anything(meta):
    assert parse_line(json.dumps({"meta": meta, "text": "x"}).encode()) == ("x", "")


def test_rejects_are_counted_and_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["good", b"{", b"", "good too", b'{"text": null}'])
    documents, report = read(path)
    assert documents == ["good", "good too"]
    assert report.rejects == {"broken JSON": 1, "no text": 1}
    assert report.examples == [f"{path}:2: broken JSON", f"{path}:5: no text"]
    with pytest.raises(ValueError, match=r"2 of 4 lines(.|\n)*x\.jsonl:2: broken JSON"):
        report.raise_if_above(0.001)
    report.raise_if_above(0.5)


def test_a_byte_order_mark_is_not_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n')
    assert read(tmp_path / "x.jsonl")[0] == ["x"]
