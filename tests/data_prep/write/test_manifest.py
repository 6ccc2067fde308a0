import json

import pytest
from prepared import LENGTH

from apex_composer.data_prep import check_manifest, verify
from apex_composer.data_prep.tokens.document_hash import NEWEST_HASH
from apex_composer.data_prep.write.verify import check_counts


def test_the_manifest_accounts_for_every_document_and_token(prepared):
    folder, manifest = prepared
    assert verify(folder / "out", workers=1) == []
    assert manifest["documents"] == sum(s["documents"] for s in manifest["sources"]) == 580
    broken = json.loads(json.dumps(manifest))
    broken["splits"]["train"]["book"]["tokens"] += 1
    assert len(check_counts(broken)) == 2


def test_the_manifest_names_the_hash_of_the_documents(prepared):
    _, manifest = prepared
    assert manifest["document_hash"] == NEWEST_HASH


def test_copies_of_validation_documents_are_dropped_and_counted(prepared):
    _, manifest = prepared
    assert sum(read["documents_duplicates"] for read in manifest["read"].values()) > 0


def test_a_run_that_does_not_fit_the_data_is_refused(prepared, tmp_path):
    folder, manifest = prepared
    digest, size = (manifest["tokenizer"][name] for name in ("sha256", "vocabulary_size"))
    for place in ("", "train", "train/book"):
        assert check_manifest(folder / "out" / place, digest, size + 64, LENGTH) == manifest
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        check_manifest(folder / "out", digest, size, 64)
    with pytest.raises(ValueError, match="the model's has 100"):
        check_manifest(folder / "out", digest, 100, LENGTH)
    with pytest.raises(ValueError, match="the run's tokenizer has 0000"):
        check_manifest(folder / "out", "0000", size, LENGTH)
    assert check_manifest(tmp_path, digest, size, LENGTH) is None
    store = f"file://{folder}/out/train/book"
    assert check_manifest(tmp_path, digest, size, LENGTH, remote=store) == manifest
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        check_manifest(tmp_path, digest, size, 64, remote=store)
    assert check_manifest(tmp_path, digest, size, 64, remote=f"file://{tmp_path}/x") is None
    assert check_manifest(folder / "out", None, size, LENGTH) == manifest  # a slow tokenizer
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        check_manifest(folder / "out", None, size, 64)


def test_a_cache_of_what_was_there_before_is_refused(prepared, tmp_path):
    """An index that is there is not fetched again, and names the shards that are read."""
    folder, manifest = prepared
    digest, size = (manifest["tokenizer"][name] for name in ("sha256", "vocabulary_size"))
    store, index = folder / "out" / "train" / "book", tmp_path / "index.json"
    given = digest, size, LENGTH
    index.write_bytes((store / "index.json").read_bytes())
    assert check_manifest(tmp_path, *given, remote=f"file://{store}") == manifest
    index.write_bytes((store / "index.json").read_bytes().replace(b"0", b"1"))
    with pytest.raises(ValueError, match="holds shards that are not those of file:.*Remove"):
        check_manifest(tmp_path, *given, remote=f"file://{store}")
