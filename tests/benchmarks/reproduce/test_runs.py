"""What becomes of runs that fail, and of the others."""

import pytest
import torch
from reproduce import bases, campaign, continued, records, runs
from reproduce.arms import Arm
from reproduce.scales import SCALES
from reproduce.texts import load, prepare_small

pytestmark = pytest.mark.numeric
ARMS = ("vanilla_wsd", "vanilla_rate_0.4", "vanilla_rate_0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture
def run(folder, tmp_path):
    """A campaign of three runs with a file of its own: its status, and its results."""

    def run() -> tuple[int, list[str]]:
        out = tmp_path / "results.jsonl"
        command = ["smoke", "--folder", str(folder), "--out", str(out), "--arms", *ARMS]
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
