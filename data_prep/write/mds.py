"""MDS shards as bytes, byte for byte those of streaming's MDSWriter, from an array of tokens.

MDSWriter appends sample by sample and imports torch. A shard of equally long samples is a header
and a block of tokens; written so, every shard can be made by another process, and copying the
tokens is all that it costs. Reference: `MDSWriter` (tests/data_prep/test_shards.py).
"""

import json
from typing import Any

import numpy as np

OFFSET_BYTES = 4
# streaming's default for "zstd".
ZSTD_LEVEL = 3


def describe_columns(
    dtype: str, sequence_length: int, shard_bytes: int, compression: str | None
) -> dict[str, Any]:
    """The header of a shard, which every entry of `index.json` repeats.

    Args:
        dtype: numpy name of the token type.
        sequence_length: tokens in a sequence.
        shard_bytes: size of a shard at most, before compression.
        compression: None or "zstd".
    """
    return {
        "column_encodings": [f"ndarray:{dtype}:{sequence_length}"],
        "column_names": ["tokens"],
        "column_sizes": [sequence_length * np.dtype(dtype).itemsize],
        "compression": compression,
        "format": "mds",
        "hashes": [],
        "size_limit": shard_bytes,
        "version": 2,
    }


def sequences_per_shard(header: dict[str, Any]) -> int:
    """How many sequences fit into a shard.

    Args:
        header: as `describe_columns` returns it.
    """
    fixed = 2 * OFFSET_BYTES + len(json.dumps(header, sort_keys=True))
    return (header["size_limit"] - fixed) // (header["column_sizes"][0] + OFFSET_BYTES)


def encode_shard(tokens: np.ndarray, header: dict[str, Any]) -> bytes:
    """Encode the sequences of one shard, before compression.

    Args:
        tokens: [sequences, sequence_length], of the header's type.
        header: as `describe_columns` returns it.
    """
    count = len(tokens)
    config = json.dumps(header, sort_keys=True).encode()
    start = OFFSET_BYTES * (count + 2) + len(config)
    offsets = start + header["column_sizes"][0] * np.arange(count + 1, dtype=np.uint32)
    return b"".join(
        (np.uint32(count).tobytes(), offsets.astype(np.uint32).tobytes(), config, tokens.tobytes())
    )


def compress(content: bytes, compression: str | None) -> bytes:
    """Compress a shard.

    Args:
        content: as `encode_shard` returns it.
        compression: None or "zstd".
    """
    if compression is None:
        return content
    import pyarrow

    codec = pyarrow.Codec(compression, compression_level=ZSTD_LEVEL)
    return codec.compress(content, asbytes=True)


def decode_shard(content: bytes, entry: dict[str, Any]) -> np.ndarray:
    """Read the tokens of a shard back: [sequences, sequence_length].

    Args:
        content: of the shard's file.
        entry: of the shard in `index.json`.

    Raises:
        ValueError: header, size or offsets are not what the entry says.
    """
    if entry["zip_data"]:
        import pyarrow

        size = entry["raw_data"]["bytes"]
        try:
            codec = pyarrow.Codec(entry["compression"])
            content = codec.decompress(content, decompressed_size=size, asbytes=True)
        except OSError as error:
            raise ValueError(f"it cannot be decompressed ({error})") from error
    _, dtype, length = entry["column_encodings"][0].split(":")
    size = entry["samples"] * int(length) * np.dtype(dtype).itemsize
    tokens = np.frombuffer(content[-size:] if size else b"", dtype=dtype)
    if len(tokens) != entry["samples"] * int(length):
        raise ValueError(f"it has {len(content)} bytes, too few for {entry['samples']} sequences")
    tokens = tokens.reshape(-1, int(length))
    header = {key: entry[key] for key in entry if key not in ("raw_data", "zip_data", "samples")}
    if encode_shard(tokens, header) != content:
        raise ValueError("its header does not fit index.json")
    return tokens


def shard_name(number: int) -> str:
    """File name of a shard, before compression.

    Args:
        number: of the shard, from 0.
    """
    return f"shard.{number:05d}.mds"


def index_entry(
    number: int, samples: int, raw_bytes: int, zip_bytes: int | None, header: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a shard in `index.json`.

    Args:
        number: of the shard, from 0.
        samples: sequences in it.
        raw_bytes: its size before compression.
        zip_bytes: its size after, or None without compression.
        header: as `describe_columns` returns it.
    """
    name = shard_name(number)
    zipped = None
    if zip_bytes is not None:
        zipped = {"basename": f"{name}.{header['compression']}", "bytes": zip_bytes, "hashes": {}}
    raw = {"basename": name, "bytes": raw_bytes, "hashes": {}}
    entry = header | {"raw_data": raw, "samples": samples, "zip_data": zipped}
    return dict(sorted(entry.items()))


def encode_index(entries: list[dict[str, Any]]) -> bytes:
    """Encode `index.json`.

    Args:
        entries: of all shards, in order.
    """
    return json.dumps({"shards": entries, "version": 2}, sort_keys=True).encode()
