"""Phase 2: from the pieces' tokens to MDS shards, each written for itself by any worker."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.atomic_files import read_json, write_bytes, write_json
from apex_composer.data_prep.choose.document_index import Corpus, Stream
from apex_composer.data_prep.paths import SHARDS, TOKENS, piece_folder
from apex_composer.data_prep.write.mds import Shard, ShardFormat, compress, encode_shard, shard_name


def shard_tasks(
    out: Path, corpus: Corpus, streams: list[Stream], format: ShardFormat
) -> Iterator[dict[str, Any]]:
    """Describe every shard: where its tokens stand."""
    per_shard = format.sequences_per_shard * format.sequence_length
    for stream in streams:
        lengths = corpus.lengths[stream.documents]
        spans = stream_spans(lengths, per_shard, stream.sequences * format.sequence_length)
        for number, (first, last, skipped, tokens) in enumerate(spans):
            folder = f"{stream.split}/{stream.domain}"
            yield {
                "name": f"{folder}/{shard_name(number, format.compression)}",
                "out": str(out),
                "stream": folder,
                "number": number,
                "reads": _locate(stream.documents[first:last], corpus, skipped, tokens),
                "tokens": tokens,
                "format": format,
            }


def stream_spans(
    lengths: np.ndarray, tokens_per_shard: int, total: int
) -> Iterator[tuple[int, int, int, int]]:
    """Cut documents laid end to end into shards.

    Args:
        lengths: tokens of the documents of one stream, in order: [n].
        tokens_per_shard: tokens of every shard but the last.
        total: tokens of all shards together.

    Yields:
        For each shard: its first document, the document after its last, the tokens of the first
        one that belong to earlier shards, and the shard's tokens.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    for start in range(0, total, tokens_per_shard):
        stop = min(start + tokens_per_shard, total)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        before = int(ends[first - 1]) if first else 0
        yield first, last + 1, start - before, stop - start


def _locate(documents: np.ndarray, corpus: Corpus, skipped: int, tokens: int) -> np.ndarray:
    """Rows of piece, first token in it and number of tokens: int64 [reads, 3]."""
    pieces = np.searchsorted(corpus.first, documents, side="right") - 1
    counts = corpus.lengths[documents].astype(np.int64)
    # Piece by piece: where each document of the corpus ends would take 8 bytes a document.
    found, heads = np.unique(pieces, return_index=True)
    ends = [
        np.cumsum(corpus.lengths[first : own[-1] + 1], dtype=np.int64)[own - first]
        for first, own in zip(corpus.first[found], np.split(documents, heads[1:]), strict=True)
    ]
    starts = np.concatenate(ends) - counts
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


def write_shard(task: dict[str, Any], report_progress: Callable[[int], None]) -> Shard:
    """Write one shard and a record of it, unless an earlier run has done so.

    Args:
        task: one of `shard_tasks`.
        report_progress: called with the number of tokens written.

    Returns:
        Its description.

    Raises:
        DiskFullError: the disk is full.
    """
    out = Path(task["out"])
    record = out / SHARDS / f"{task['name']}.json"
    shard = read_json(record)
    if shard is None or not _is_whole(out, shard):
        shard = _write(out, task)
        write_json(record, shard)
    report_progress(task["tokens"])
    return shard


def _is_whole(out: Path, shard: Shard) -> bool:
    """Whether a recorded shard is there; its tokens need not be gathered and compressed again."""
    path = out / shard["file"]
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]


def _write(out: Path, task: dict[str, Any]) -> Shard:
    format = task["format"]
    tokens = read_tokens(out, task["reads"], task["tokens"], format.dtype)
    sequences = tokens.reshape(-1, format.sequence_length)
    raw = encode_shard(sequences, format)
    content = compress(raw, format.compression)
    path = out / task["name"]
    # A run killed between the shard and its record leaves a whole shard, which is kept.
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
    return {
        "sequences": len(sequences),
        "file": task["name"],
        "raw_bytes": len(raw),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_tokens(out: Path, reads: np.ndarray, count: int, dtype: str) -> np.ndarray:
    """Copy tokens out of the pieces: [count].

    Args:
        out: output folder, with all pieces.
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
