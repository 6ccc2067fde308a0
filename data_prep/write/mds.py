"""MDS shards and their index as bytes, byte for byte those of streaming's MDSWriter.

MDSWriter appends sample by sample and imports torch. A shard of equally long samples is a header
and a block of tokens; written so, every shard can be made by another process, and copying the
tokens is all that it costs. Reference: `MDSWriter` (tests/data_prep/write/test_mds.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.paths import INDEX

OFFSET_BYTES = 4
# streaming's default for "zstd".
ZSTD_LEVEL = 3

# A shard as the manifest describes it: `sequences`, `file`, `raw_bytes`, `bytes`, `sha256`.
Shard = Mapping[str, Any]


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a preparation have in common.

    Args:
        dtype: numpy name of the token type.
        sequence_length: tokens in a sequence.
        shard_bytes: size of a shard at most, before compression.
        compression: None or "zstd".
    """

    dtype: str
    sequence_length: int
    shard_bytes: int
    compression: str | None

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence."""
        return self.sequence_length * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> dict[str, Any]:
        """The header of a shard, which every entry of `index.json` repeats."""
        return {
            "column_encodings": [f"ndarray:{self.dtype}:{self.sequence_length}"],
            "column_names": ["tokens"],
            "column_sizes": [self.sequence_bytes],
            "compression": self.compression,
            "format": "mds",
            "hashes": [],
            "size_limit": self.shard_bytes,
            "version": 2,
        }

    @property
    def sequences_per_shard(self) -> int:
        """How many sequences fit into a shard."""
        fixed = 2 * OFFSET_BYTES + len(_encode(self.header))
        return (self.shard_bytes - fixed) // (self.sequence_bytes + OFFSET_BYTES)


def encode_shard(tokens: np.ndarray, format: ShardFormat) -> bytes:
    """Encode the sequences of one shard, before compression.

    Args:
        tokens: [sequences, sequence_length], of the format's type.
        format: that of all shards.
    """
    count, header = len(tokens), _encode(format.header)
    start = OFFSET_BYTES * (count + 2) + len(header)
    offsets = start + format.sequence_bytes * np.arange(count + 1, dtype=np.uint32)
    return b"".join(
        (np.uint32(count).tobytes(), offsets.astype(np.uint32).tobytes(), header, tokens.tobytes())
    )


def compress(content: bytes, compression: str | None) -> bytes:
    """Compress what `encode_shard` returned, by None or "zstd"."""
    if compression is None:
        return content
    import pyarrow

    codec = pyarrow.Codec(compression, compression_level=ZSTD_LEVEL)
    return codec.compress(content, asbytes=True)


def shard_name(number: int, compression: str | None = None) -> str:
    """File name of a shard, which are counted from 0."""
    return f"shard.{number:05d}.mds" + (f".{compression}" if compression else "")


def index_files(streams: Mapping[str, Sequence[Shard]], format: ShardFormat) -> dict[str, bytes]:
    """All index files: one of each stream, and one of each split that names the shards of all.

    That of a split is as `streaming.base.util.merge_index` writes it.

    Args:
        streams: shards in their order, by `<split>/<domain>`.
        format: that of all shards.

    Returns:
        Contents by their path below the output folder.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    for stream, shards in streams.items():
        split, domain = stream.split("/")
        for number, shard in enumerate(shards):
            for folder, below in ((stream, ""), (split, domain)):
                entry = _index_entry(number, shard, format, below)
                entries.setdefault(folder, []).append(entry)
    return {
        f"{folder}/{INDEX}": _encode({"shards": listed, "version": 2})
        for folder, listed in entries.items()
    }


def _index_entry(number: int, shard: Shard, format: ShardFormat, below: str) -> dict[str, Any]:
    names = [str(Path(below, shard_name(number, kind))) for kind in (None, format.compression)]
    raw = {"basename": names[0], "bytes": shard["raw_bytes"], "hashes": {}}
    zipped = {"basename": names[1], "bytes": shard["bytes"], "hashes": {}}
    return format.header | {
        "raw_data": raw,
        "samples": shard["sequences"],
        "zip_data": zipped if format.compression else None,
    }


def _encode(content: Any) -> bytes:
    """JSON as streaming writes it."""
    return json.dumps(content, sort_keys=True).encode()
