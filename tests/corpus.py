"""A small RedPajama-format corpus that the tests of data preparation share."""

import json
import random
from pathlib import Path

import pyarrow

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "ei", "o", "un")]


def sentences(seed: int, words: int = 120) -> str:
    """Text with enough regularity for a tokenizer to learn from."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write_jsonl(path: Path, lines: list[bytes | str]) -> Path:
    """Write lines, compressed by the file's suffix; a text becomes a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        line if isinstance(line, bytes) else json.dumps({"text": line, "meta": {}}).encode()
        for line in lines
    ]
    with pyarrow.output_stream(str(path), compression="detect") as stream:
        stream.write(b"".join(line + b"\n" for line in encoded))
    return path


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Two domains, three files, three kinds of compression."""
    texts = [sentences(seed) for seed in range(3 * documents)]
    write_jsonl(folder / "book" / "book.jsonl", texts[:documents])
    write_jsonl(folder / "github" / "deep" / "a.jsonl.zst", texts[documents : 2 * documents])
    write_jsonl(folder / "github" / "b.jsonl.gz", texts[2 * documents :])
    return folder
