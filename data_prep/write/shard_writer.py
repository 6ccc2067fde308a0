"""Phase 2: from the pieces' tokens to MDS shards, each written for itself by any worker."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.atomic_files import read_json, write_bytes, write_json
from apex_composer.data_prep.choose.document_index import Corpus, Stream
from apex_composer.data_prep.choose.splits import stream_spans
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import SHARD_RECORDS, TOKENS, piece_folder
from apex_composer.data_prep.tokens.tokenizer import token_type
from apex_composer.data_prep.write import mds as shards


def shard_tasks(
    out: Path, corpus: Corpus, streams: list[Stream], options: Options, vocabulary_size: int
) -> Iterator[dict[str, Any]]:
    """Describe every shard: where its tokens stand.

    Args:
        out: output folder.
        corpus: all documents.
        streams: of all splits and domains.
        options: of the preparation.
        vocabulary_size: number of tokens, which decides their type.
    """
    dtype, length = token_type(vocabulary_size), options.sequence_length
    header = shards.describe_columns(dtype, length, options.shard_bytes, options.compression)
    per_shard = shards.sequences_per_shard(header) * length
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    for stream in streams:
        lengths = corpus.lengths[stream.documents]
        spans = stream_spans(lengths, per_shard, stream.sequences * length)
        for number, (first, last, skipped, tokens) in enumerate(spans):
            reads = _locate(stream.documents[first:last], corpus, ends, skipped, tokens)
            yield {
                "name": f"{stream.split}/{stream.domain}/{shards.shard_name(number)}",
                "out": str(out),
                "stream": f"{stream.split}/{stream.domain}",
                "number": number,
                "reads": reads,
                "tokens": tokens,
                "header": header,
            }


def _locate(
    documents: np.ndarray, corpus: Corpus, ends: np.ndarray, skipped: int, tokens: int
) -> np.ndarray:
    """Rows of piece, first token in it and number of tokens: int64 [reads, 3]."""
    pieces = np.searchsorted(corpus.first, documents, side="right") - 1
    counts = corpus.lengths[documents].astype(np.int64)
    starts = ends[documents] - counts
    first = corpus.first[pieces]
    before = np.where(first > 0, ends[first - 1], 0)
    starts -= before
    starts[0] += skipped
    counts[0] -= skipped
    counts[-1] -= counts.sum() - tokens
    return _join(np.stack([pieces, starts, counts], axis=1))


def _join(reads: np.ndarray) -> np.ndarray:
    """Make one read of documents that stand one after the other."""
    follows = (reads[1:, 0] == reads[:-1, 0]) & (reads[1:, 1] == reads[:-1, 1] + reads[:-1, 2])
    heads = np.flatnonzero(np.concatenate([[True], ~follows]))
    joined = reads[heads]
    joined[:, 2] = np.add.reduceat(reads[:, 2], heads)
    return joined


def write_shard(task: dict[str, Any], report_progress: Any) -> dict[str, Any]:
    """Write one shard and its record, unless an earlier run has done it.

    Args:
        task: from `shard_tasks`.
        report_progress: called with the tokens written.

    Returns:
        The record: `stream`, `number`, `sequences`, `file`, `raw_bytes`, `bytes` and `sha256`.

    Raises:
        DiskFullError: the disk is full.
    """
    out = Path(task["out"])
    record_path = out / SHARD_RECORDS / task["stream"] / f"{task['number']:05d}.json"
    record = read_json(record_path)
    if record is None or not _is_intact(out, record):
        record = _write_shard(out, task)
        write_json(record_path, record)
    report_progress({"tokens": task["tokens"]})
    return record


def _is_intact(out: Path, record: dict[str, Any]) -> bool:
    try:
        content = (out / record["file"]).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == record["sha256"]


def _write_shard(out: Path, task: dict[str, Any]) -> dict[str, Any]:
    header, compression = task["header"], task["header"]["compression"]
    _, dtype, length = header["column_encodings"][0].split(":")
    tokens = read_tokens(out, task["reads"], task["tokens"], dtype).reshape(-1, int(length))
    raw = shards.encode_shard(tokens, header)
    content = shards.compress(raw, compression)
    name = shards.shard_name(task["number"]) + (f".{compression}" if compression else "")
    path = out / task["stream"] / name
    # A run killed between the shard and its record leaves a whole shard, which need not be redone.
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
    return {
        "stream": task["stream"],
        "number": task["number"],
        "sequences": len(tokens),
        "file": f"{task['stream']}/{name}",
        "raw_bytes": len(raw),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_tokens(out: Path, reads: np.ndarray, count: int, dtype: str) -> np.ndarray:
    """Copy tokens out of the pieces: [count].

    Args:
        out: output folder.
        reads: rows of piece, first token and number of tokens, sorted by piece.
        count: tokens of all rows together.
        dtype: numpy name of the token type.

    Raises:
        OSError: a piece is shorter than its documents say.
    """
    tokens, position, size = np.empty(count, dtype=dtype), 0, np.dtype(dtype).itemsize
    for piece in np.unique(reads[:, 0]):
        path = piece_folder(out, int(piece)) / TOKENS
        with path.open("rb", buffering=0) as file:
            for _, start, length in reads[reads[:, 0] == piece]:
                file.seek(int(start) * size)
                target = memoryview(tokens[position : position + length]).cast("B")
                if file.readinto(target) != len(target):
                    raise OSError(f"{path} is cut short. Remove {path.parent} and run again.")
                position += int(length)
    return tokens
