"""What becomes of runs that fail, and of the others."""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch
from reproduce import bases, campaign, continued, records, runs
from reproduce.arms import Arm
from reproduce.scales import SCALES
from reproduce.texts import load, prepare_small

ARMS = ("vanilla_wsd", "vanilla_rate_0.4", "vanilla_rate_0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture
def run(folder, tmp_path):
    """A campaign of three runs with a file of its own: its status, and its results."""

    def run() -> tuple[int, list[str]]:
        out = tmp_path / "results.jsonl"
        where = ["--folder", str(folder), "--texts", str(folder / "texts"), "--out", str(out)]
        command = ["smoke", *where, "--arms", *ARMS]
        status = campaign.main(command)
        return status, [record["arm"] for record in records.read(out)]

    return run


@pytest.fixture
def failing(monkeypatch):
    """Lets the second of the three runs fail."""

    def fail(error: Exception) -> None:
        def run_arm(arm, *arguments):
            if arm.name == ARMS[1]:
                raise error
            return continued.run_arm(arm, *arguments)

        monkeypatch.setattr(runs, "run_arm", run_arm)

    return fail


def test_a_run_that_diverged_is_recorded_and_not_done_again(run, failing, tmp_path, capsys):
    failing(FloatingPointError("the loss on a is nan: the run diverged"))
    for _ in range(2):
        assert run() == (0, [ARMS[0], ARMS[2]])
        said = capsys.readouterr().out
        assert "no result of vanilla_rate_0.4 1: the loss on a is nan" in said
    (found,) = records.read(tmp_path / "results.diverged.jsonl")
    assert (found["arm"], found["seed"], found["settings"]["rate"]) == (ARMS[1], 1, 0.4)
    assert "commit" in found["machine"]


def test_a_run_that_failed_ends_no_other_and_is_done_again(run, failing, monkeypatch, capsys):
    failing(ZeroDivisionError("a mistake"))
    assert run() == (1, [ARMS[0], ARMS[2]])
    said = capsys.readouterr()
    assert "vanilla_rate_0.4 1 failed: ZeroDivisionError('a mistake')" in said.err
    assert "2 of 3 runs" in said.out
    monkeypatch.setattr(runs, "run_arm", continued.run_arm)
    assert run() == (0, [ARMS[0], ARMS[2], ARMS[1]])


def test_operators_of_a_run_that_diverged_are_not_measured(folder, tmp_path):
    """Their singular values would be an error of another kind."""
    prepare_small(tmp_path / "texts")
    scale, texts, device = SCALES["smoke"], load(tmp_path / "texts"), torch.device("cpu")
    base = bases.get_base("mixture", scale, texts, folder, device)
    wild = Arm("wild", apex={}, rate=1e30)
    with pytest.raises(FloatingPointError, match="the run diverged"):
        continued.run_arm(wild, 1, scale, base, texts, device)


@pytest.fixture
def two_workers(monkeypatch):
    """Threads in place of processes, which take seconds to begin."""
    threads = lambda workers, context, begin: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(runs, "ProcessPoolExecutor", threads)
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], workers=2))


def test_two_workers_find_what_one_does(run, tmp_path, two_workers, monkeypatch):
    status, arms = run()
    assert (status, set(arms)) == (0, set(ARMS))
    two = {record["arm"]: record["losses"] for record in records.read(tmp_path / "results.jsonl")}
    (tmp_path / "results.jsonl").unlink()
    monkeypatch.undo()
    run()
    one = {record["arm"]: record["losses"] for record in records.read(tmp_path / "results.jsonl")}
    assert one == two


def test_a_run_that_failed_in_a_worker_ends_no_other(run, failing, two_workers, capsys):
    failing(ZeroDivisionError("a mistake"))
    status, arms = run()
    assert (status, set(arms)) == (1, {ARMS[0], ARMS[2]})
    assert "vanilla_rate_0.4 1 failed: ZeroDivisionError" in capsys.readouterr().err


def test_a_worker_that_was_killed_ends_the_campaign_with_the_names_of_its_runs():
    future = Future()
    future.set_exception(BrokenProcessPool())
    running = {future: runs.Job(Arm("a"), 1), Future(): runs.Job(Arm("b"), 2)}
    with pytest.raises(SystemExit, match="a worker was killed.*while a 1 and b 2 ran"):
        runs._result(future, running)
