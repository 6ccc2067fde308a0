"""SIGTERM in the middle of a run: saved, ended in order, and continued bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import resume_worker
import torch
from composer import Callback, Evaluator
from composer.core import Event
from composer_run import make_trainer
from helpers import TokenDataset, tiny_llama
from tiny_run import write_shards
from torch.utils.data import DataLoader

from apex_composer import APEX
from apex_composer.callbacks.preemption import MARKER, Preemption, shelter_workers

WORKER = Path(resume_worker.__file__)


class Terminate(Callback):
    """Sends this process SIGTERM at an event of a batch."""

    def __init__(self, event: Event, batch: int, times: int = 1):
        self.event, self.batch, self.times = event, batch, times

    def run_event(self, event, state, logger):
        if event == self.event and state.timestamp.batch.value == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, *callbacks: Callback, preemption=None, save_interval="1dur", **options):
    """A run of six batches in two stages; returns its weights."""
    model = tiny_llama()
    trainer = make_trainer(
        APEX(stages=["2ba", "4ba"]),
        model=model,
        callbacks=(preemption or Preemption(), *callbacks),
        run_name="preempted",
        autoresume=True,
        save_folder=str(folder),
        save_interval=save_interval,
        **options,
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    """The weights of the run that nobody interrupts."""
    return train(tmp_path_factory.mktemp("whole"))


def evaluation() -> dict:
    loader = DataLoader(TokenDataset(8, seed=9), batch_size=4)
    return {"eval_dataloader": Evaluator(label="eval", dataloader=loader), "eval_interval": "3ba"}


@pytest.mark.parametrize(
    ("event", "batch", "saved", "options"),
    [
        (Event.AFTER_FORWARD, 2, 3, {}),
        (Event.BATCH_END, 2, 2, {}),  # on the boundary of a stage
        (Event.EVAL_BATCH_START, 3, 3, evaluation()),
        (Event.BATCH_CHECKPOINT, 3, 4, {"save_interval": "1ba"}),  # after its own check
    ],
)
def test_sigterm_saves_and_the_same_run_goes_on(tmp_path, expected, event, batch, saved, options):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        train(tmp_path, Terminate(event, batch), **options)
    assert exit.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "latest-rank0.pt").readlink().name == f"ep0-ba{saved}-rank0.pt"
    assert json.loads((tmp_path / MARKER).read_text())["batch"] == saved
    weights = train(tmp_path, **options)
    assert not (tmp_path / MARKER).exists()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_the_exit_status_can_be_chosen(tmp_path):
    with pytest.raises(SystemExit) as exit:
        train(tmp_path, Terminate(Event.BATCH_START, 1), preemption=Preemption(exit_status=75))
    assert exit.value.code == 75


def test_before_the_first_batch_there_is_nothing_to_save(tmp_path):
    with pytest.raises(SystemExit) as exit:
        train(tmp_path, Terminate(Event.FIT_START, 0))
    assert exit.value.code == 0 and not list(tmp_path.glob("*.pt"))


def test_after_the_last_batch_the_run_is_finished(tmp_path, expected):
    """The saver's checkpoint of batch 6 exists, only the end of the fit is left."""
    weights = train(tmp_path, Terminate(Event.AFTER_FORWARD, 5))
    assert (tmp_path / "ep0-ba6-rank0.pt").exists() and not (tmp_path / MARKER).exists()
    assert torch.equal(weights["model.norm.weight"], expected["model.norm.weight"])


def test_a_further_fit_is_watched_too(tmp_path):
    trainer = make_trainer(
        callbacks=(Preemption(), Terminate(Event.AFTER_FORWARD, 7)),
        save_folder=str(tmp_path),
        save_interval="1dur",
    )
    trainer.fit()
    with pytest.raises(SystemExit) as exit:
        trainer.fit(duration="4ba")
    trainer.close()
    assert exit.value.code == 0
    assert json.loads((tmp_path / MARKER).read_text())["batch"] == 8


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="preemption needs checkpoints.*save_folder"):
        make_trainer(callbacks=(Preemption(),))
    with pytest.raises(ValueError, match="save_weights_only"):
        train(tmp_path, save_weights_only=True)


@pytest.mark.parametrize("status", [-1, 128, True, "0"])
def test_settings_are_checked(status):
    with pytest.raises(ValueError, match="^exit_status: got .*, allowed: an integer from 0 to 127"):
        Preemption(exit_status=status)
    with pytest.raises(TypeError, match="Did you mean 'exit_status'"):
        Preemption(exit_state=0)


def test_workers_outlive_the_clusters_signal_and_obey_their_parent():
    loader = DataLoader(TokenDataset(64), batch_size=1, num_workers=2, persistent_workers=True)
    shelter_workers(loader)
    shelter_workers(loader)  # once is enough
    batches = iter(loader)
    for _ in range(2):  # one of each worker: only then both have started
        next(batches)
    workers = batches._workers
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    assert sum(1 for _ in batches) == 62  # a dead worker would raise here
    assert all(worker.is_alive() for worker in workers)
    # torch ends what does not stop by itself with terminate(); it must go on working.
    workers[0].terminate()
    deadline = time.monotonic() + 10
    while workers[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers[0].is_alive()


def start(data: Path, folder: Path, die: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(WORKER), str(data), str(folder), die]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_process_ends_with_status_0_and_its_command_goes_on(tmp_path):
    """The run of `resume_worker.py`: streamed data, three stages, a stage-wise learning rate."""
    write_shards(tmp_path / "data", samples=36)
    done = start(tmp_path / "data", tmp_path / "run", "term-5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved after batch 5" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "end.pt").exists()
    for folder in ("run", "whole"):
        resume_worker.main(str(tmp_path / "data"), str(tmp_path / folder), "none")
    end, expected = (torch.load(tmp_path / f / "end.pt") for f in ("run", "whole"))
    assert end["history"] == expected["history"]
    for name, weight in expected["weights"].items():
        assert torch.equal(end["weights"][name], weight), name


def test_signals_within_seconds_are_one_request(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, Terminate(Event.BATCH_START, 2, times=2))
    assert (tmp_path / "ep0-ba3-rank0.pt").exists()


@pytest.mark.long
def test_a_second_sigterm_exits_at_once(tmp_path):
    write_shards(tmp_path / "data", samples=36)
    done = start(tmp_path / "data", tmp_path / "run", "twice-5")
    assert done.returncode == -signal.SIGTERM and "second SIGTERM" in done.stderr
    assert not (tmp_path / "run" / "ep0-ba5-rank0.pt").exists()


def launch(data: Path, folder: Path, die: str) -> subprocess.CompletedProcess:
    """Two ranks under Composer's launcher, in a process group of their own."""
    launcher = Path(sys.executable).with_name("composer")
    command = [launcher, "-n", "2", WORKER, data, folder, die]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        start_new_session=True,
    )


@pytest.mark.long
def test_all_ranks_leave_together_under_the_launcher(tmp_path):
    """SIGTERM to all processes, the launcher too (which hands it on), and to one rank alone; and
    one rank that is lost."""
    write_shards(tmp_path / "data", samples=72)
    assert launch(tmp_path / "data", tmp_path / "whole", "none").returncode == 0
    expected = torch.load(tmp_path / "whole" / "end.pt")
    for die in ("group-3", "one-3", "lost-6"):
        done = launch(tmp_path / "data", tmp_path / die, die)
        if die.startswith("lost"):  # SIGKILL of one rank: nobody can save, the launcher ends all
            assert done.returncode != 0 and not (tmp_path / die / "end.pt").exists()
        else:
            assert done.returncode == 0, (die, done.stderr[-3000:])
            assert "saved after batch 3" in done.stderr, die
        assert launch(tmp_path / "data", tmp_path / die, "none").returncode == 0
        end = torch.load(tmp_path / die / "end.pt")
        for name, weight in expected["weights"].items():
            assert torch.equal(end["weights"][name], weight), (die, name)
