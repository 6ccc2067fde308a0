import json

import numpy as np
import pyarrow
import pytest

from apex_composer.data_prep.write.mds import (
    ShardFormat,
    compress,
    encode_shard,
    index_files,
    shard_name,
)


def write_with_streaming(folder, sequences, format):
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:{format.dtype}:{format.sequence_length}"}
    with MDSWriter(
        out=str(folder),
        columns=columns,
        size_limit=format.shard_bytes,
        compression=format.compression,
    ) as writer:
        for sequence in sequences:
            writer.write({"tokens": sequence})


def write(sequences, format):
    """The shards of one stream, and what the manifest says of them."""
    per_shard, contents, shards = format.sequences_per_shard, [], []
    for start in range(0, len(sequences), per_shard):
        part = sequences[start : start + per_shard]
        raw = encode_shard(part, format)
        contents.append(compress(raw, format.compression))
        shards.append({"sequences": len(part), "raw_bytes": len(raw), "bytes": len(contents[-1])})
    return contents, shards


@pytest.mark.parametrize(
    ("dtype", "count", "length", "limit"),
    [("uint16", 30, 8, 400), ("uint16", 1, 32, 1 << 20), ("uint32", 77, 5, 1000)],
)
def test_shards_and_index_are_those_of_mdswriter(tmp_path, dtype, count, length, limit):
    sequences = np.arange(count * length, dtype=dtype).reshape(count, length)
    format = ShardFormat(dtype, length, limit, None)
    write_with_streaming(tmp_path, sequences, format)
    contents, shards = write(sequences, format)
    for number, content in enumerate(contents):
        assert content == (tmp_path / shard_name(number)).read_bytes()
    index = index_files({"train/book": shards}, format)["train/book/index.json"]
    assert index == (tmp_path / "index.json").read_bytes()


def test_the_index_of_a_split_is_that_of_streamings_merge(tmp_path):
    from streaming.base.util import merge_index

    format = ShardFormat("uint16", 8, 400, None)
    streams = {}
    for domain, count in (("book", 30), ("cc", 7)):
        sequences = np.zeros((count, 8), dtype="uint16")
        write_with_streaming(tmp_path / domain, sequences, format)
        streams[f"train/{domain}"] = write(sequences, format)[1]
    merge_index([str(tmp_path / d / "index.json") for d in ("book", "cc")], str(tmp_path))
    found, theirs = index_files(streams, format)["train/index.json"], tmp_path / "index.json"
    assert json.loads(found) == json.loads(theirs.read_bytes())


def test_compressed_shards_have_mdswriters_names_and_content(tmp_path):
    # zstd's own bytes differ between versions of the library.
    sequences = np.arange(160, dtype="uint16").reshape(20, 8)
    format = ShardFormat("uint16", 8, 1 << 20, "zstd")
    write_with_streaming(tmp_path, sequences, format)
    [content], [shard] = write(sequences, format)
    theirs = (tmp_path / shard_name(0, "zstd")).read_bytes()
    whole = [
        pyarrow.Codec("zstd").decompress(packed, decompressed_size=shard["raw_bytes"], asbytes=True)
        for packed in (content, theirs)
    ]
    assert whole[0] == whole[1] == encode_shard(sequences, format)
    shard["bytes"] = len(theirs)
    index = index_files({"train/book": [shard]}, format)["train/book/index.json"]
    assert index == (tmp_path / "index.json").read_bytes()
