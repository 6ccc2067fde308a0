import pytest
from corpus import write_corpus
from prepared import run

from apex_composer.data_prep import merge


def test_a_per_domain_validation_set_and_the_rest(prepared, tmp_path):
    folder, _ = prepared
    changes = {"val_per_domain": True, "train_tokens": None, "cpt_tokens": None}
    manifest = run(folder / "corpus", tmp_path / "out", **changes)
    assert {n["sequences"] for n in manifest["splits"]["validation"].values()} == {20}
    assert all(n["tokens_beyond_budget"] == 0 for n in manifest["splits"]["train"].values())
    assert all(read["documents_beyond_budget"] == 0 for read in manifest["read"].values())


@pytest.mark.parametrize("damage", ["report.json", "documents.bin"])
def test_a_damaged_piece_is_named(tmp_path, damage):
    run(write_corpus(tmp_path / "corpus", documents=80), tmp_path / "out", shard=(1, 1))
    piece = tmp_path / "out" / ".work" / "pieces" / "000001"
    if damage == "report.json":
        (piece / damage).unlink()
    else:
        (piece / damage).write_bytes((piece / damage).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"The piece {piece} is damaged"):
        merge(tmp_path / "out", workers=1)
