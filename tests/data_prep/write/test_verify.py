"""Every change of a finished preparation is found."""

import json
import shutil

import numpy as np
import pytest
from prepared import run, stored_sequences

from apex_composer.data_prep import verify
from apex_composer.data_prep.errors import SettingsError


def test_verify_finds_a_flipped_byte_missing_files_and_a_strange_one(prepared, tmp_path):
    folder, _ = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    shard = out / "cpt" / "book" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    (out / "train" / "book" / "shard.00000.mds").unlink()
    (out / "train" / "book" / "notes").touch()
    (out / "train" / "github" / "shard.00000.mds").write_bytes(b"cut")
    (out / "streams.yaml").unlink()
    assert [fault.split(":")[0] for fault in verify(out, workers=2)] == [
        "cpt/book/shard.00000.mds",
        "streams.yaml",
        "train/book/notes",
        "train/book/shard.00000.mds",
        "train/github/shard.00000.mds",
    ]


@pytest.mark.parametrize(
    "name",
    ["train/book/index.json", "train/index.json", "rejects.jsonl", "tokenizer/tokenizer.json"],
)
def test_verify_finds_any_change_of_any_other_file(prepared, tmp_path, name):
    folder, _ = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (out / name).write_bytes((out / name).read_bytes() + b" ")
    assert verify(out, workers=1) == [f"{name}: its bytes have changed (sha256)"]
    (out / name).unlink()
    assert verify(out, workers=1) == [f"{name}: cannot be read (No such file or directory)"]


def test_verify_finds_any_change_of_the_manifest(prepared, tmp_path):
    folder, manifest = prepared
    out = shutil.copytree(folder / "out", tmp_path / "out")
    for key in manifest:
        changed = {name: value for name, value in manifest.items() if name != key}
        (out / "manifest.json").write_text(json.dumps(changed))
        if key == "format":
            with pytest.raises(SettingsError, match="no finished preparation"):
                verify(out, workers=1)
        else:
            assert verify(out, workers=1)[0].startswith("manifest.json: it was changed")


def test_compressed_shards_hold_the_same_and_may_lie_beside_what_streaming_unpacks(
    prepared, tmp_path
):
    folder, _ = prepared
    run(folder / "corpus", tmp_path / "out", compression="zstd")
    assert verify(tmp_path / "out", workers=1) == []
    plain, packed = (
        stored_sequences(f / "cpt" / "book") for f in (folder / "out", tmp_path / "out")
    )
    assert np.array_equal(plain, packed)
    assert list((tmp_path / "out").rglob("*.mds")) and verify(tmp_path / "out", workers=1) == []
