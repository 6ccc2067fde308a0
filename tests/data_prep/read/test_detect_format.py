import json

import pytest
from corpus import write_jsonl
from hub_folders import dolma_record, save_dataset, write_dolma, write_fineweb, write_parquet

from apex_composer.data_prep.errors import SettingsError, SourceError
from apex_composer.data_prep.read.sources import find_sources


def detected(folder):
    [format] = {source.format for source in find_sources(folder)}
    return format


@pytest.mark.parametrize("suffix", ["json.gz", "jsonl.gz", "jsonl.zst", "jsonl"])
def test_dolma_is_told_by_its_records(tmp_path, suffix):
    write_dolma(tmp_path / "c4" / f"x.{suffix}", ["a"])
    assert detected(tmp_path) == "dolma"


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"text": "a", "id": "1", "source": "web"}, "redpajama-v1"),
        ({"text": "a", "id": "1", "source": ["web"], "added": "2023"}, "redpajama-v1"),
        ({"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}, "source": "x"}, "slimpajama"),
    ],
)
def test_other_jsonl_is_not_taken_for_dolma(tmp_path, record, format):
    write_jsonl(tmp_path / "c4" / "x.jsonl.gz", [b"bad", json.dumps(record).encode()])
    assert detected(tmp_path) == format


@pytest.mark.parametrize("suffix", ["json.gz", "jsonl.gz"])
def test_a_first_file_without_a_good_record_does_not_decide(tmp_path, suffix):
    write_jsonl(tmp_path / "train" / f"0.{suffix}", [])
    write_jsonl(tmp_path / "train" / f"1.{suffix}", [b"bad"])
    write_dolma(tmp_path / "train" / f"2.{suffix}", ["a"])
    assert detected(tmp_path) == "dolma"


def test_archives_that_show_no_format_are_asked_about(tmp_path):
    path = write_jsonl(tmp_path / "documents" / "x.json.gz", [b'{"raw_content": "a"}'])
    assert detected(tmp_path) == "redpajama-v2"
    write_jsonl(path, [b'{"text": "a", "source": "web"}'])
    with pytest.raises(SettingsError, match=r"the keys \['source', 'text'\].*--format"):
        find_sources(tmp_path)
    assert find_sources(tmp_path, "dolma")[0].format == "dolma"


def test_dolma_beside_other_jsonl_is_ambiguous(tmp_path):
    write_jsonl(tmp_path / "a" / "x.jsonl", [dolma_record("a")])
    write_jsonl(tmp_path / "b" / "x.jsonl", ["plain"])
    with pytest.raises(SettingsError, match="several formats .*dolma: a/x.jsonl"):
        find_sources(tmp_path)


def test_parquet_is_told_by_its_columns(tmp_path):
    write_fineweb(tmp_path / "a" / "data" / "x.parquet", ["a"], metadata=[{"a": 1}])
    assert detected(tmp_path / "a") == "fineweb"
    write_parquet(tmp_path / "b" / "x.parquet", {"text": ["a"], "meta": ["{}"]})
    assert detected(tmp_path / "b") == "redpajama-sample"
    with pytest.raises(SettingsError, match="several formats .*fineweb: a/data/x.parquet"):
        find_sources(tmp_path)


@pytest.mark.parametrize("more", [{}, {"dump": ["a"], "language": ["en"], "meta": ["{}"]}])
def test_parquet_that_shows_no_format_or_two_is_asked_about(tmp_path, more):
    write_parquet(tmp_path / "x.parquet", {"text": ["a"], "source": ["wiki"], **more})
    with pytest.raises(SettingsError, match=r"x.parquet: its columns \(.*source.*--format"):
        find_sources(tmp_path)
    assert find_sources(tmp_path, "fineweb")[0].domain == "fineweb"
    assert find_sources(tmp_path, "redpajama-sample")[0].domain is None


def test_a_first_parquet_that_is_damaged_is_an_error_that_names_it(tmp_path):
    write_fineweb(tmp_path / "x.parquet", ["a"]).write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="x.parquet cannot be read"):
        find_sources(tmp_path)


def test_arrow_is_told_by_its_name_and_not_read_beside_others(tmp_path):
    save_dataset(tmp_path / "poems", [["a"]])
    assert detected(tmp_path) == "arrow"
    write_fineweb(tmp_path / "data" / "x.parquet", ["a"])
    with pytest.raises(SettingsError, match="several formats .*arrow: poems/"):
        find_sources(tmp_path)
