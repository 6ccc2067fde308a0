import json

from prepared import file_hashes, run

from apex_composer.data_prep.paths import piece_folder
from apex_composer.data_prep.pieces import write_missing
from apex_composer.data_prep.tokens.piece import PieceReport


def test_the_number_of_workers_changes_no_byte(prepared, tmp_path):
    folder, _ = prepared
    run(folder / "corpus", tmp_path / "out", workers=3)
    assert file_hashes(tmp_path / "out") == file_hashes(folder / "out")


def test_the_size_of_pieces_moves_no_document(prepared, tmp_path):
    folder, manifest = prepared
    other = run(folder / "corpus", tmp_path / "out", piece_bytes=1 << 20)
    assert other["splits"] == manifest["splits"] and other["shards"] == manifest["shards"]


def test_a_piece_that_is_there_is_reported_and_not_made_again(tmp_path):
    class Piece:
        out, number = tmp_path, 3

    report = PieceReport("a.jsonl", documents=2, tokens=30, characters=400)
    folder = piece_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(vars(report)))
    news = []
    assert write_missing({"piece": Piece}, news.append, None, PieceReport) == report
    assert news == [{"documents": 2, "tokens": 30, "characters": 400, "source": "a.jsonl"}]
