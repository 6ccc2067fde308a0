import json

import numpy as np
import pytest

from apex_composer.data_prep.write import mds as shards


def write_with_streaming(folder, sequences, limit, compression):
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:{sequences.dtype}:{sequences.shape[1]}"}
    arguments = {"columns": columns, "size_limit": limit, "compression": compression}
    with MDSWriter(out=str(folder), **arguments) as writer:
        for sequence in sequences:
            writer.write({"tokens": sequence})
    return json.loads((folder / "index.json").read_text())


@pytest.mark.parametrize(
    ("dtype", "count", "length", "limit"),
    [("uint16", 30, 8, 400), ("uint16", 1, 32, 1 << 20), ("uint32", 77, 5, 1000)],
)
def test_shards_are_those_of_mdswriter(tmp_path, dtype, count, length, limit):
    sequences = np.arange(count * length, dtype=dtype).reshape(count, length)
    index = write_with_streaming(tmp_path, sequences, limit, None)
    header = shards.describe_columns(dtype, length, limit, None)
    per_shard = shards.sequences_per_shard(header)
    entries = []
    for number, start in enumerate(range(0, count, per_shard)):
        part = sequences[start : start + per_shard]
        content = shards.encode_shard(part, header)
        assert content == (tmp_path / shards.shard_name(number)).read_bytes()
        entries.append(shards.index_entry(number, len(part), len(content), None, header))
        assert (shards.decode_shard(content, entries[-1]) == part).all()
    assert entries == index["shards"]
    assert shards.encode_index(entries) == (tmp_path / "index.json").read_bytes()


def test_compressed_shards_have_mdswriters_names_and_come_back(tmp_path):
    sequences = np.arange(160, dtype="uint16").reshape(20, 8)
    index = write_with_streaming(tmp_path / "a", sequences, 1 << 20, "zstd")
    header = shards.describe_columns("uint16", 8, 1 << 20, "zstd")
    raw = shards.encode_shard(sequences, header)
    packed = shards.compress(raw, "zstd")
    entry = shards.index_entry(0, 20, len(raw), len(packed), header)
    assert entry["zip_data"]["basename"] == index["shards"][0]["zip_data"]["basename"]
    assert entry["raw_data"] == index["shards"][0]["raw_data"]
    assert (shards.decode_shard(packed, entry) == sequences).all()


def test_a_shard_that_does_not_fit_its_entry_is_refused():
    header = shards.describe_columns("uint16", 8, 400, None)
    raw = shards.encode_shard(np.zeros((3, 8), dtype="uint16"), header)
    with pytest.raises(ValueError, match="too few"):
        shards.decode_shard(raw[:20], shards.index_entry(0, 3, len(raw), None, header))
    with pytest.raises(ValueError, match="header"):
        shards.decode_shard(raw, shards.index_entry(0, 2, len(raw), None, header))
