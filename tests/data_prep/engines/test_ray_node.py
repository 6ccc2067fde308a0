"""What a worker of a cluster may leave behind, without a cluster."""

import errno
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
from corpus import write_corpus
from prepared import file_hashes, run, small_options, tokenizer_folder

from apex_composer.data_prep import output_folder, preparation, prepare
from apex_composer.data_prep.choose.job_plan import read_plan
from apex_composer.data_prep.engines import ray_node
from apex_composer.data_prep.engines.ray_cluster import Attempt
from apex_composer.data_prep.pieces import _describe, _piece_task, write_missing
from apex_composer.data_prep.tokens.piece import PieceReport, tokenise_piece


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def write_late(task, report, takeover, moment):
    """Write a piece as ever, while another driver begins at a moment."""

    def report_late(news):
        report(news)
        if moment == "the last report":
            takeover()

    if moment == "the first check":
        takeover()
    return write_missing(task, report_late, write=tokenise_piece, report=PieceReport)


@pytest.mark.filterwarnings("ignore:.*has no locks")
@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("moment", ["the first check", "the last report"])
def test_a_worker_of_a_killed_driver_leaves_no_piece_in_the_next_job(
    tmp_path, monkeypatch, moment, has_locks
):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    run(corpus, out, shard=(1, 1))
    shutil.rmtree(out / ".work" / "pieces" / "000001")
    stale = _describe(_piece_task(out, read_plan(out), 1))
    driver = ray_node.Driver(None, str(tmp_path), out / ".work" / "driver.partial-1", ())
    driver.fence.mkdir()
    given = {"tokenizer": tokenizer_folder(), "options": small_options(piece_bytes=8192)}
    if not has_locks:
        monkeypatch.setattr(output_folder.fcntl, "flock", no_locks)

    def begin(*arguments):
        raise KeyboardInterrupt

    def takeover():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preparation, "tokenise_pieces", begin)
            prepare(corpus, out, overwrite=True, workers=1, **given)

    late = partial(write_late, takeover=takeover, moment=moment)
    nobody = SimpleNamespace(tell=SimpleNamespace(remote=lambda *news: None))
    kind, content, _ = ray_node.run_attempt(late, stale, driver, 0, nobody)
    assert (kind, type(content)) == ("error", FileNotFoundError)
    assert not list((out / ".work").glob("pieces/*"))
    prepare(corpus, out, workers=1, **given)
    prepare(corpus, tmp_path / "whole", workers=1, **given)
    assert file_hashes(out) == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize("news", [[1, 2, 3], [{"documents": n, "source": "a"} for n in (1, 2, 3)]])
def test_reports_count_once_whatever_is_lost(news):
    heard = []
    attempt = Attempt({"name": "a"}, 0, 0)
    attempt.tell(0, news[:1], heard.append)
    attempt.tell(2, news[2:], heard.append)  # the one between was lost: the result brings all
    assert heard == news[:1]
    attempt.tell(len(attempt.told), news[len(attempt.told) :], heard.append)
    assert heard == news
    attempt.take_back(heard.append)
    numbers = [one if isinstance(one, int) else one["documents"] for one in heard]
    assert sum(numbers) == 0 and len(numbers) == 6
