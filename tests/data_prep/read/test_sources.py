import gzip
import json

import pytest
from corpus import write_corpus, write_jsonl
from hub_folders import save_dataset, write_dolma, write_fineweb, write_parquet

from apex_composer.data_prep.errors import SettingsError, SourceError
from apex_composer.data_prep.read.sources import find_sources

SLIM = json.dumps({"text": "a", "meta": {"redpajama_set_name": "RedPajamaBook"}}).encode()


def touch(root, *names):
    """Files with one record of RedPajama-V2 or one row of the sample; jsonl without any."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = gzip.compress(b'{"raw_content": "a"}\n') if name.endswith(".json.gz") else b""
        (root / name).write_bytes(content)
        if name.endswith(".parquet"):
            write_parquet(root / name, {"text": ["a"], "meta": ["{}"]})


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
    for name in ("y.jsonl.xz", "y.JSONL", "y.Parquet", "y.jsonl.GZ", "y.JSON.ZST"):
        (tmp_path / "a" / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is named or compressed in a way"):
            find_sources(tmp_path)
        (tmp_path / "a" / name).unlink()


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
    (tmp_path / "data" / ".git").mkdir()
    (tmp_path / "data" / ".git" / "link").symlink_to("nothing")
    assert list(summary(tmp_path / "data")) == ["book/x.jsonl"]
    for target in ("unmounted", tmp_path / "data" / "arxiv"):  # the second leads to itself
        (tmp_path / "data" / "arxiv").symlink_to(target)
        with pytest.raises(SourceError, match="data/arxiv is a link to nothing"):
            find_sources(tmp_path / "data")
        (tmp_path / "data" / "arxiv").unlink()


def test_fineweb_is_one_domain_and_others_by_language(tmp_path):
    places = {
        "data/CC-MAIN-2013-20/000_00000.parquet": "fineweb",
        "data/deu_Latn/train/000_00000.parquet": "deu_Latn",
        "data/train-00000-of-00001.parquet": "fineweb",
        "000_00000.parquet": "fineweb",
    }
    for name in places:
        write_fineweb(tmp_path / name, ["a"])
    for name in ("README.md", ".gitattributes", "data/infos.json", ".cache/x.parquet.incomplete"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no data")
    assert summary(tmp_path) == dict(sorted(places.items()))
    sources = find_sources(tmp_path)
    assert {(source.format, source.splittable) for source in sources} == {("fineweb", False)}
    assert sources[0].bytes == (tmp_path / sources[0].path).stat().st_size
    write_fineweb(tmp_path / "20231101.en" / "x.parquet", ["a"])
    with pytest.raises(ValueError, match="'20231101.en' has an unusable name"):
        find_sources(tmp_path)


def test_fineweb_and_its_samples_are_not_read_as_one(tmp_path):
    small, large, whole = names = [
        "sample/100BT/0.parquet", "sample/10BT/0.parquet", "data/CC-MAIN-2013-20/0.parquet"
    ]  # fmt: skip
    for name in names:
        write_fineweb(tmp_path / name, ["a"])
    with pytest.raises(SettingsError, match=f"{whole}, {small}, {large}. Their documents are the"):
        find_sources(tmp_path)
    (tmp_path / whole).unlink()
    with pytest.raises(SettingsError, match=f"{small}, {large}"):
        find_sources(tmp_path)
    (tmp_path / large).unlink()
    assert summary(tmp_path) == {small: "fineweb"}


def test_arrow_is_named_by_the_folder_of_the_data_set(tmp_path):
    save_dataset(tmp_path / "poems" / "deep", [["a"], ["b"]])
    save_dataset(tmp_path / "books" / "train", [["a"]])
    domains = ["books", "poems", "poems"]
    assert list(summary(tmp_path).values()) == domains
    assert list(summary(f"file://{tmp_path}", "arrow").values()) == domains
    assert list(summary(tmp_path / "books" / "train").values()) == ["books"]
    assert list(summary(f"file://{tmp_path}/books", "arrow").values()) == ["books"]
    cached = tmp_path / "poems" / "default" / "0.0.0" / ("0a1b" * 10)
    save_dataset(cached, [["a"]])
    assert list(summary(cached).values()) == ["poems"]


def test_dolma_is_one_source_a_record_and_no_attributes(tmp_path):
    write_dolma(tmp_path / "wiki" / "v0" / "documents" / "0.jsonl", ["a"])
    write_dolma(tmp_path / "c4-0000.json.gz", ["a"])
    write_jsonl(tmp_path / "wiki" / "v0" / "attributes" / "x" / "0.jsonl.gz", [b'{"id": "1"}'])
    (tmp_path / "manifest.json").write_text("{}")
    assert summary(tmp_path) == {"c4-0000.json.gz": None, "wiki/v0/documents/0.jsonl": None}
    assert [source.splittable for source in find_sources(tmp_path)] == [False, True]


def test_what_was_never_finished_is_not_left_out_in_silence(tmp_path):
    write_jsonl(tmp_path / "a" / "x.jsonl", ["text"])
    for name in ("y.jsonl.gz.crdownload", "y.parquet.part", "y.jsonl.aria2"):
        (tmp_path / "a" / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"a/{name} is the beginning of a file"):
            find_sources(tmp_path)
        (tmp_path / "a" / name).unlink()
    hidden = tmp_path / ".cache" / "huggingface" / "download" / "f00d.0a1b.incomplete"
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"")
    with pytest.raises(ValueError, match="f00d.0a1b.incomplete is the beginning of a file"):
        find_sources(tmp_path)
    hidden.unlink()
    save_dataset(tmp_path / "0a1b.incomplete", [["a"]])
    with pytest.raises(ValueError, match="0a1b.incomplete/data-.* never finished"):
        find_sources(tmp_path, "arrow")


@pytest.mark.parametrize("name", ["x.parquet", "x.json.gz", "x.jsonl.zst", "x.arrow"])
def test_gits_pointers_are_told_from_files(tmp_path, name):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is Git's pointer.*git lfs pull"):
        find_sources(tmp_path)


def test_the_hubs_cache_is_read_by_the_folder_of_a_revision(tmp_path):
    cache, revision = tmp_path / "datasets--org--fineweb", "0a1b" * 10
    snapshot = cache / "snapshots" / revision
    blob = write_fineweb(cache / "blobs" / "f00d.parquet", ["a"]).rename(cache / "blobs" / "f00d")
    (snapshot / "data" / "en").mkdir(parents=True)
    (snapshot / "data" / "en" / "x.parquet").symlink_to("../../../../blobs/f00d")
    [source] = find_sources(snapshot)
    assert (source.domain, source.format, source.bytes) == ("en", "fineweb", blob.stat().st_size)
    for input in (cache, tmp_path):
        with pytest.raises(ValueError, match=f"of one: .*/snapshots/{revision}"):
            find_sources(input)
