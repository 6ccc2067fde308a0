"""Folders of FineWeb, Dolma and `datasets` as they lie on disk, for the tests of reading."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from corpus import write_jsonl

CRAWL = "CC-MAIN-2013-20"


def write_parquet(path: Path, rows: dict[str, Any] | pyarrow.Table, **options: Any) -> Path:
    """A parquet file, in folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.table(rows)
    pyarrow.parquet.write_table(table, path, **options)
    return path


def write_fineweb(path: Path, texts: list[str | None], **more: Any) -> Path:
    """A file with some of FineWeb's columns."""
    count = len(texts)
    rows = {"text": texts, "dump": [CRAWL] * count, "language": ["en"] * count, **more}
    return write_parquet(path, rows, row_group_size=13)


def dolma_record(text: str, source: Any = "wiki") -> bytes:
    """A record as Dolma's files have it."""
    record = {"id": "1", "text": text, "source": source, "added": "2023-04-11T09:00:00.000Z"}
    return json.dumps(record | {"metadata": {"length": len(text)}, "version": "v1"}).encode()


def write_dolma(path: Path, texts: list[str], source: Any = "wiki") -> Path:
    """A file of one source."""
    return write_jsonl(path, [dolma_record(text, source) for text in texts])


def write_arrow(
    path: Path, rows: dict[str, Any] | pyarrow.Table, batch: int = 7, format: str = "stream"
) -> Path:
    """An arrow file of the stream format, which datasets writes, or of the file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.table(rows)
    make = pyarrow.ipc.new_stream if format == "stream" else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, batch)
    return path


def save_dataset(folder: Path, shards: list[list[str]], split: str | None = None) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` leaves it."""
    count = len(shards)
    names = [f"data-{number:05}-of-{count:05}.arrow" for number in range(count)]
    for name, texts in zip(names, shards, strict=True):
        write_arrow(folder / name, {"text": texts})
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def save_splits(folder: Path, splits: dict[str, list[str]]) -> Path:
    """A folder as `datasets.DatasetDict.save_to_disk` leaves it."""
    for split, texts in splits.items():
        save_dataset(folder / split, [texts], split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def cache_dataset(folder: Path, files: dict[str, list[str]], splits: list[str]) -> Path:
    """A folder as `datasets.load_dataset` leaves it in its cache."""
    for name, texts in files.items():
        write_arrow(folder / name, {"text": texts})
    info = {"splits": {split: {"name": split} for split in splits}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
