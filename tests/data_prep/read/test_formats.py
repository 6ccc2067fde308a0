"""The same documents in every release of RedPajama end as the same shards."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from corpus import sentences, write_jsonl
from prepared import file_hashes, small_options, tokenizer_folder

from apex_composer.data_prep import prepare

TEXTS = [sentences(seed) for seed in range(60)]


def lines(*records):
    return [json.dumps(record).encode() for record in records]


def v1(folder):
    half = len(TEXTS) // 2
    first, second = TEXTS[:half], TEXTS[half:]
    write_jsonl(
        folder / "common_crawl" / "2019-30" / "en.jsonl.zst",
        lines(*({"text": text, "pred_label": "wiki"} for text in first)),
    )
    write_jsonl(folder / "common_crawl" / "2020-05" / "en.jsonl.zst", second)


def v1_plain(folder):
    write_jsonl(folder / "cc" / "x.jsonl", [*TEXTS[:7], b"", *TEXTS[7:]])


def sample(folder):
    folder.mkdir()
    meta = [json.dumps({"pred_label": "wiki", "source": "cc/2019-30"})] * len(TEXTS)
    table = pyarrow.table({"text": TEXTS, "meta": meta})
    pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=13)


def sample_jsonl(folder):
    write_jsonl(folder / "cc_2019-30_sample.jsonl", TEXTS)


def v2(folder):
    path = folder / "documents" / "2023-06" / "0000" / "en_head.json.gz"
    path.parent.mkdir(parents=True)
    records = lines(*({"raw_content": text, "url": "u"} for text in TEXTS))
    path.write_bytes(b"".join(gzip.compress(line + b"\n") for line in records))


def slimpajama(folder):
    meta = {"redpajama_set_name": "RedPajamaCommonCrawl"}
    records = lines(*({"text": text, "meta": meta} for text in TEXTS))
    write_jsonl(folder / "train" / "chunk1" / "x.jsonl.zst", records)


def run(input, out):
    options = small_options(train_tokens=None, cpt_tokens=None, val_tokens=320, proportions=None)
    prepare(input, out, tokenizer=tokenizer_folder(), options=options, workers=1)
    return {name: digest for name, digest in file_hashes(out).items() if "/cc/" in name}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    v1_plain(folder / "in")
    hashes = run(folder / "in", folder / "out")
    assert {name.split("/")[0] for name in hashes} == {"validation", "train"}
    return hashes


@pytest.mark.parametrize("release", [v1, sample, sample_jsonl, v2, slimpajama])
def test_every_release_gives_the_same_shards(release, expected, tmp_path):
    release(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == expected


def test_a_remote_store_gives_the_same_shards(expected, tmp_path):
    v1(tmp_path / "in")
    assert run(f"file://{tmp_path / 'in'}", tmp_path / "out") == expected


def mixed_slimpajama(folder):
    names = {"github": "RedPajamaGithub", "cc": "RedPajamaCommonCrawl", "arxiv": "RedPajamaArXiv"}
    records = [
        {"text": text, "meta": {"redpajama_set_name": list(names.values())[n % 3]}}
        for n, text in enumerate(TEXTS)
    ]
    write_jsonl(folder / "train" / "chunk1" / "x.jsonl.zst", lines(*records))


def mixed_sample(folder):
    meta = ["{'content_hash': 'a', 'language': []}", '{"pred_label": "wiki"}', "{'yymm': '1'}"]
    folder.mkdir()
    table = pyarrow.table({"text": TEXTS, "meta": [meta[n % 3] for n in range(len(TEXTS))]})
    pyarrow.parquet.write_table(table, folder / "train.parquet")


@pytest.mark.parametrize("write", [mixed_slimpajama, mixed_sample])
def test_a_file_of_several_domains_ends_as_their_folders_do(tmp_path, write):
    # In an order that is not that of the alphabet: domains were once mixed up by it.
    for n, domain in enumerate(("github", "cc", "arxiv")):
        write_jsonl(tmp_path / "folders" / domain / "x.jsonl", TEXTS[n::3])
    run(tmp_path / "folders", tmp_path / "expected")
    write(tmp_path / "mixed")
    run(tmp_path / "mixed", tmp_path / "out")
    found, expected = (
        {name: digest for name, digest in file_hashes(tmp_path / out).items() if ".mds" in name}
        for out in ("out", "expected")
    )
    assert found == expected and len(found) >= 6
