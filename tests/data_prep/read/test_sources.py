import json

import pytest
from corpus import write_corpus, write_jsonl

from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.sources import find_sources

SLIM = json.dumps({"text": "a", "meta": {"redpajama_set_name": "RedPajamaBook"}}).encode()


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def summary(root, format="auto"):
    prefix = len(str(root)) + 1
    return {source.path[prefix:]: source.domain for source in find_sources(root, format)}


def test_domains_are_the_first_folders_and_files_are_sorted(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "github" / "README.md").write_text("not data")
    write_jsonl(tmp_path / ".cache" / "x.jsonl", ["hidden"])
    write_jsonl(tmp_path / "book" / ".part.jsonl", ["hidden"])
    sources = find_sources(tmp_path)
    names = ["book/book.jsonl", "github/b.jsonl.gz", "github/deep/a.jsonl.zst"]
    assert [source.path for source in sources] == [str(tmp_path / name) for name in names]
    assert [source.domain for source in sources] == ["book", "github", "github"]
    assert [source.splittable for source in sources] == [True, False, False]
    assert sources[0].bytes == (tmp_path / "book" / "book.jsonl").stat().st_size
    assert {source.format for source in sources} == {"redpajama-v1"}


def test_v1_gets_the_names_of_the_yamls(tmp_path):
    touch(tmp_path, "common_crawl/2019-30/en.jsonl.zst", "c4/c4-train.0.jsonl", "book/book.jsonl")
    (tmp_path / "common_crawl/2019-30/en.jsonl.zst").unlink()
    write_jsonl(tmp_path / "common_crawl/2019-30/en.jsonl.zst", ["a"])
    assert list(summary(tmp_path).values()) == ["book", "c4", "cc"]
    touch(tmp_path, "novels/x.jsonl")
    assert find_sources(tmp_path)[0].format == "jsonl"
    assert summary(tmp_path)["novels/x.jsonl"] == "novels"
    with pytest.raises(ValueError, match="'novels' is no domain of RedPajama"):
        find_sources(tmp_path, "redpajama-v1")


def test_the_sample_is_parquet_or_files_named_by_domain(tmp_path):
    touch(tmp_path / "a", "data/train-0.parquet", "data/README.md")
    assert summary(tmp_path / "a") == {"data/train-0.parquet": None}
    touch(tmp_path / "b", "cc_2019-30_sample.jsonl", "arxiv_sample.jsonl")
    assert list(summary(tmp_path / "b").values()) == ["arxiv", "cc"]
    assert {source.format for source in find_sources(tmp_path / "b")} == {"redpajama-sample"}
    touch(tmp_path / "b", "poems_sample.jsonl")
    with pytest.raises(ValueError, match="'poems' is no domain"):
        find_sources(tmp_path / "b")


def test_v2_leaves_out_its_signals_and_signatures(tmp_path):
    touch(
        tmp_path,
        "documents/2023-06/0000/en_head.json.gz",
        "quality_signals/2023-06/0000/en_head.signals.json.gz",
        "duplicates/2023-06/0000/en_head.duplicates.parquet",
        "minhash/2023-06/0000/en_head.minhash.parquet",
    )
    assert summary(tmp_path) == {"documents/2023-06/0000/en_head.json.gz": "cc"}


def test_slimpajama_is_told_by_its_records(tmp_path):
    write_jsonl(tmp_path / "train" / "chunk1" / "x.jsonl.zst", [b"bad", b"", SLIM])
    [source] = find_sources(tmp_path)
    assert (source.format, source.domain) == ("slimpajama", None)
    assert find_sources(tmp_path, "jsonl")[0].domain == "train"  # who says so gets it


@pytest.mark.parametrize(
    "names",
    [
        ["a/x.jsonl", "b/y.json.gz"],
        ["a/x.jsonl", "data/y.parquet"],
        ["a/x.json.gz", "data/y.parquet"],
    ],
)
def test_mixed_formats_are_ambiguous_until_one_is_named(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=r"several formats .*--format"):
        find_sources(tmp_path)
    formats = {".jsonl": "jsonl", "son.gz": "redpajama-v2", "arquet": "redpajama-sample"}
    assert list(summary(tmp_path, formats[names[0][-6:]])) == names[:1]


def test_slimpajama_beside_other_jsonl_is_ambiguous(tmp_path):
    write_jsonl(tmp_path / "a" / "x.jsonl", [SLIM])
    write_jsonl(tmp_path / "b" / "x.jsonl", ["plain"])
    with pytest.raises(ValueError, match="several formats"):
        find_sources(tmp_path)


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no file of any known format"):
        find_sources(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_sources(tmp_path / "absent")
    write_jsonl(tmp_path / "a" / "x.jsonl", ["text"])
    with pytest.raises(FileNotFoundError, match=r"redpajama-v2.*documents/"):
        find_sources(tmp_path, "redpajama-v2")
    with pytest.raises(ValueError, match="format='pile' must be one of auto, redpajama-v1"):
        find_sources(tmp_path, "pile")


def test_files_outside_a_domain_are_refused(tmp_path):
    write_jsonl(tmp_path / "loose.jsonl", ["text"])
    with pytest.raises(ValueError, match="outside a domain folder"):
        find_sources(tmp_path)


def test_domain_names_must_be_usable_as_labels(tmp_path):
    write_jsonl(tmp_path / "a b" / "x.jsonl", ["text"])
    with pytest.raises(ValueError, match="a b"):
        find_sources(tmp_path)


def test_archives_that_no_reader_opens_are_not_left_out_in_silence(tmp_path):
    write_jsonl(tmp_path / "a" / "x.jsonl", ["text"])
    touch(tmp_path, "a/y.jsonl.xz")
    with pytest.raises(ValueError, match="y.jsonl.xz is named or compressed in a way"):
        find_sources(tmp_path)


def test_an_unreadable_first_file_is_an_error_that_names_it(tmp_path):
    touch(tmp_path, "a/x.jsonl.zst")
    with pytest.raises(SourceError, match="a/x.jsonl.zst"):
        find_sources(tmp_path)
    (tmp_path / "a" / "x.jsonl.zst").unlink()
    (tmp_path / "a" / "y.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match="a/y.jsonl"):
        find_sources(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    write_jsonl(tmp_path / "disk" / "x.jsonl", ["text"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "data")
    assert list(summary(tmp_path / "data")) == ["book/x.jsonl"]
