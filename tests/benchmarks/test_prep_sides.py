from corpus import write_corpus
from prep_sides import measure_shards
from prepared import LENGTH, run


def test_every_token_is_counted_once(tmp_path):
    manifest = run(write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out")
    sequences = [n["sequences"] for split in manifest["splits"].values() for n in split.values()]
    measured = measure_shards(tmp_path / "out", LENGTH)
    assert measured["tokens"] == LENGTH * sum(sequences)
    files = [file for files in manifest["shards"].values() for file in files]
    assert measured["bytes"] == sum(file["raw_bytes"] for file in files)
