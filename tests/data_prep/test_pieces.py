import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from prepared import file_hashes, run

from apex_composer.data_prep.atomic_files import fenced
from apex_composer.data_prep.choose.job_plan import read_plan
from apex_composer.data_prep.paths import piece_folder
from apex_composer.data_prep.pieces import _describe, _piece_task, write_missing
from apex_composer.data_prep.tokens.piece import PieceReport, tokenise_piece


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


@pytest.mark.parametrize("fences", [(), ("one", "one"), ("one", "other")])
def test_two_attempts_at_a_piece_at_once_leave_one(prepared, tmp_path, fences):
    out = tmp_path / "out"
    run(prepared[0] / "corpus", out, shard=(1, 1))
    folder = piece_folder(out, 1)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    task, both = _describe(_piece_task(out, read_plan(out), 1)), threading.Barrier(2)

    def attempt(fence):
        with fenced(out / ".work" / fence) if fence else nullcontext():
            # The last report comes just before the folder gets its name.
            return write_missing(task, lambda news: both.wait(60), tokenise_piece, PieceReport)

    for fence in set(fences):
        (out / ".work" / fence).mkdir()
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(attempt, fences or (None, None)))
    assert reports == [PieceReport(**json.loads(expected["report.json"]))] * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert not list(out.rglob("*.partial*"))
