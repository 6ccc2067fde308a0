"""The same documents in every format end as the same shards."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpus import sentences, write_jsonl
from hub_folders import dolma_record, save_dataset, save_splits, write_dolma, write_fineweb
from prepared import file_hashes, small_options, tokenizer_folder

from apex_composer.data_prep import prepare, verify
from apex_composer.data_prep.choose.job_plan import date_source, source_differences
from apex_composer.data_prep.choose.proportions import read_proportions
from apex_composer.data_prep.read.domains import source_domain
from apex_composer.data_prep.read.sources import find_sources

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


def fineweb(folder):
    write_fineweb(folder / "data" / "cc" / "train" / "0.parquet", TEXTS[:7], score=list(range(7)))
    write_fineweb(folder / "data" / "cc" / "train" / "1.parquet", TEXTS[7:], score=["high"] * 53)


def dolma(folder):
    write_dolma(folder / "cc-0000.json.gz", TEXTS[:7], "cc")
    write_dolma(folder / "cc-0001.json.gz", TEXTS[7:], "cc")


def saved(folder):
    save_dataset(folder / "cc", [TEXTS[:7], TEXTS[7:]])


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


@pytest.mark.parametrize(
    "release", [v1, sample, sample_jsonl, v2, slimpajama, fineweb, dolma, saved]
)
def test_every_release_gives_the_same_shards(release, expected, tmp_path):
    release(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == expected


@pytest.mark.parametrize("release", [v1, fineweb, dolma, saved])
def test_a_remote_store_gives_the_same_shards(release, expected, tmp_path):
    release(tmp_path / "in")
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


def mixed_dolma(folder):
    records = [dolma_record(text, ("github", "cc", "arxiv")[n % 3]) for n, text in enumerate(TEXTS)]
    write_jsonl(folder / "x.json.gz", records)


@pytest.mark.parametrize("write", [mixed_slimpajama, mixed_sample, mixed_dolma])
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


def own_fineweb(folder):
    write_fineweb(folder / "data" / "CC-MAIN-2013-20" / "0.parquet", [*TEXTS[:20], None, TEXTS[20]])
    write_fineweb(folder / "data" / "no" / "train" / "0.parquet", TEXTS[21:])
    return {"fineweb": 21, "no": 39}, [("data/CC-MAIN-2013-20/0.parquet", 21, "no text", "fineweb")]


def own_dolma(folder):
    write_dolma(folder / "pes2o-0000.json.gz", TEXTS[:20], "pes2o")
    records = [dolma_record(text, "web/no") for text in TEXTS[20:]]
    write_jsonl(folder / "web-0000.jsonl", [*records, dolma_record("a", None), dolma_record(" ")])
    domain = source_domain("web/no")
    rejects = [("web-0000.jsonl", 41, "unknown domain", "unknown")]
    rejects += [("web-0000.jsonl", 42, "empty text", "wiki")]
    return {"pes2o": 20, domain: 40}, rejects


def own_arrow(folder):
    save_dataset(folder / "poems", [TEXTS[:10], [*TEXTS[10:20], None]])
    save_splits(folder / "prose", {"train": TEXTS[20:], "test": ["held out " + TEXTS[0]]})
    rejects = [("poems/data-00001-of-00002.arrow", 11, "no text", "poems")]
    return {"poems": 20, "prose": 40}, rejects


@pytest.mark.filterwarnings("ignore:.*other splits than train")
@pytest.mark.parametrize("write", [own_fineweb, own_dolma, own_arrow])
def test_domains_of_any_name_are_counted_and_shared_out_by_a_file(write, tmp_path):
    documents, rejects = write(tmp_path / "in")
    first, second = documents
    (tmp_path / "p.yaml").write_text(f"{first}: 3\n{second}: 1\nz: 9\n")
    manifest = prepare(
        tmp_path / "in",
        tmp_path / "out",
        tokenizer=tokenizer_folder(),
        options=small_options(
            val_tokens=640,
            train_tokens=1280,
            cpt_tokens=None,
            proportions=read_proportions(str(tmp_path / "p.yaml")),
            max_reject_rate=0.1,
        ),
        workers=1,
    )
    assert {domain: read["documents"] for domain, read in manifest["read"].items()} == documents
    assert manifest["absent_domains"] == ["z"]
    assert {
        split: {domain: numbers["sequences"] for domain, numbers in domains.items()}
        for split, domains in manifest["splits"].items()
    } == {"validation": {first: 15, second: 5}, "train": {first: 30, second: 10}}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    prefix = len(str(tmp_path / "in")) + 1
    assert [
        (line["file"][prefix:], line["line"], line["reason"], line["domain"]) for line in lines
    ] == rejects
    assert not verify(tmp_path / "out", workers=1)


@pytest.mark.parametrize("write", [own_fineweb, own_dolma, own_arrow])
@pytest.mark.filterwarnings("ignore:.*other splits than train")
def test_a_file_that_changes_while_it_is_read_is_noticed(write, tmp_path):
    write(tmp_path / "in")
    sources = find_sources(tmp_path / "in")
    dated = [date_source(source) for source in sources]
    path = Path(sources[-1].path)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 1))
    assert source_differences(dated, sources) == [f"{path} has changed"]
