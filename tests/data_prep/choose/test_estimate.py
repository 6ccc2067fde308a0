import json

import pytest
from corpus import sentences, write_jsonl
from hub_folders import save_dataset, write_dolma, write_fineweb
from prepared import tokenizer_folder

from apex_composer.data_prep.choose.estimate import (
    FILES_SAMPLED,
    TEXT_SAMPLED,
    estimate_domains,
    take_samples,
)
from apex_composer.data_prep.errors import SourceError
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.data_prep.tokens.document_hash import hash_text
from apex_composer.data_prep.tokens.tokenizer import read_backend

TOKENIZER = tokenizer_folder() / "tokenizer.json"


def estimate(folder):
    return estimate_domains(take_samples(find_sources(folder)), TOKENIZER)


def tokens_of(texts: list[str]) -> int:
    """Counted by the library, bos and eos included."""
    encoded = read_backend(str(TOKENIZER)).encode_batch(texts, add_special_tokens=False)
    return sum(len(one) + 2 for one in encoded)


def test_what_is_read_whole_is_counted(tmp_path):
    texts = [sentences(seed) for seed in range(12)]
    write_jsonl(tmp_path / "book" / "a.jsonl", texts[:5])
    write_jsonl(tmp_path / "book" / "b.jsonl.gz", texts[5:])
    found = estimate(tmp_path)["book"]
    assert (found.documents, found.sampled) == (12, 12)
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    assert found.tokens == tokens_of(texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_the_beginning_of_a_file_stands_for_all_of_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr("apex_composer.data_prep.choose.estimate.DOMAIN_SAMPLED", TEXT_SAMPLED)
    texts = [sentences(seed) for seed in range(1000)]
    # What records say beside their text may be longer than it.
    meta = {"url": "https://example.org/" + 80 * "x", "found": list(range(400))}
    records = [json.dumps({"text": text, "meta": meta}).encode() for text in texts]
    write_jsonl(tmp_path / "book" / name, records)
    found = estimate(tmp_path)["book"]
    assert found.sampled < 400
    assert found.documents == pytest.approx(1000, rel=0.05)
    assert found.tokens == pytest.approx(tokens_of(texts), rel=0.05)


def test_files_that_are_not_looked_into_count_by_their_size(tmp_path):
    for number in range(FILES_SAMPLED + 4):
        write_jsonl(tmp_path / "book" / f"{number:02}.jsonl", [sentences(number)])
    found = estimate(tmp_path)["book"]
    assert found.sampled == FILES_SAMPLED
    assert found.documents == pytest.approx(FILES_SAMPLED + 4, rel=0.05)


@pytest.mark.parametrize("format", ["arrow", "fineweb", "dolma"])
def test_every_format_is_estimated_from_its_beginning(tmp_path, monkeypatch, format):
    monkeypatch.setattr("apex_composer.data_prep.choose.estimate.DOMAIN_SAMPLED", TEXT_SAMPLED)
    texts = [sentences(seed) for seed in range(1000)]
    if format == "arrow":
        save_dataset(tmp_path / "wiki", [texts])
    elif format == "fineweb":
        write_fineweb(tmp_path / "wiki" / "0.parquet", texts)
    else:
        write_dolma(tmp_path / "0.json.gz", texts)
    found = estimate(tmp_path)["wiki"]
    assert found.sampled < 400
    assert found.documents == pytest.approx(1000, rel=0.05)
    assert found.tokens == pytest.approx(tokens_of(texts), rel=0.05)


def test_a_small_source_of_dolma_is_found_among_many_files_of_others(tmp_path):
    for number in range(3 * FILES_SAMPLED):
        write_dolma(tmp_path / f"c4-{number:04}.json.gz", [sentences(number)], "c4")
    write_dolma(tmp_path / "wiki-0000.json.gz", [sentences(99)], "wiki")
    found = estimate(tmp_path)
    assert found["c4"].documents == pytest.approx(3 * FILES_SAMPLED, rel=0.05)
    assert found["wiki"].documents == 1


def test_files_that_are_named_by_hashes_are_no_sources_of_their_own(tmp_path):
    for number in range(3 * FILES_SAMPLED):
        name = f"part-{number:05}-{hash_text(str(number)):016x}-{'abcd' * (number % 2)}.json.gz"
        write_dolma(tmp_path / name, [sentences(number)])
    found = estimate(tmp_path)["wiki"]
    assert found.sampled == FILES_SAMPLED  # not of every file: that would not fit into memory
    assert found.documents == pytest.approx(3 * FILES_SAMPLED, rel=0.05)


def test_rows_that_are_rejected_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("apex_composer.data_prep.choose.estimate.DOMAIN_SAMPLED", TEXT_SAMPLED)
    texts = [sentences(seed) if seed % 2 else None for seed in range(1000)]
    write_fineweb(tmp_path / "wiki" / "0.parquet", texts)
    assert estimate(tmp_path)["wiki"].documents == pytest.approx(500, rel=0.05)


def test_zeros_behind_an_archive_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("apex_composer.data_prep.choose.estimate.DOMAIN_SAMPLED", TEXT_SAMPLED)
    path = write_jsonl(tmp_path / "wiki" / "x.jsonl.gz", [sentences(seed) for seed in range(1000)])
    path.write_bytes(path.read_bytes() + bytes(512))
    assert estimate(tmp_path)["wikipedia"].documents == pytest.approx(1000, rel=0.05)


def test_an_arrow_file_that_is_cut_behind_the_sample_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("apex_composer.data_prep.choose.estimate.DOMAIN_SAMPLED", TEXT_SAMPLED)
    texts = [sentences(seed) for seed in range(1000)]
    [path] = save_dataset(tmp_path / "wiki", [texts]).glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceError, match=f"{path} cannot be read.*damaged or cut short"):
        estimate(tmp_path)
