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


def start(*command: object) -> subprocess.Popen:
    """A program of Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *(str(part) for part in command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    """A folder and a process that gets SIGTERM at its batch 5, started before the other tests."""
    folder = tmp_path_factory.mktemp("process")
    write_shards(folder / "data", samples=36)
    with start(WORKER, folder / "data", folder / "run", "term-5") as running:
        yield folder, running
        running.kill()


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
    # The run wants to go on: without the marker it would look finished.
    assert json.loads((tmp_path / MARKER).read_text())["batch"] == 0


def test_a_second_preemption_before_the_first_batch_leaves_the_marker(tmp_path, expected):
    for event, batch in ((Event.AFTER_FORWARD, 2), (Event.FIT_START, 3)):
        with pytest.raises(SystemExit):
            train(tmp_path, Terminate(event, batch))
        assert json.loads((tmp_path / MARKER).read_text())["batch"] == 3
    weights = train(tmp_path)
    assert not (tmp_path / MARKER).exists()
    assert torch.equal(weights["model.norm.weight"], expected["model.norm.weight"])


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


def test_a_process_ends_with_status_0_and_its_command_goes_on(process):
    """The run of `resume_worker.py`: streamed data, three stages, a stage-wise learning rate."""
    folder, running = process
    _, told = running.communicate(timeout=300)
    assert running.returncode == 0, told[-3000:]
    assert "saved after batch 5" in told and "Traceback" not in told
    assert not (folder / "run" / "end.pt").exists()
    resume_worker.main(str(folder / "data"), str(folder / "run"), "none")
    end = torch.load(folder / "run" / "end.pt")
    assert [record["start_batch"] for record in end["history"]] == [0, 4, 7]


def test_signals_within_seconds_are_one_request(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, Terminate(Event.BATCH_START, 2, times=2))
    assert (tmp_path / "ep0-ba3-rank0.pt").exists()


@pytest.mark.long
def test_a_second_sigterm_exits_at_once(tmp_path):
    write_shards(tmp_path / "data", samples=36)
    running = start(WORKER, tmp_path / "data", tmp_path / "run", "twice-5")
    _, told = running.communicate(timeout=300)
    assert running.returncode == -signal.SIGTERM and "second SIGTERM" in told
    assert not (tmp_path / "run" / "ep0-ba5-rank0.pt").exists()


def launch(*arguments: object) -> tuple[int, str]:
    """Two ranks under Composer's launcher; returns status and text."""
    running = start(Path(sys.executable).with_name("composer"), "-n", "2", WORKER, *arguments)
    _, told = running.communicate(timeout=300)
    return running.returncode, told


@pytest.mark.long
def test_all_ranks_leave_together_under_the_launcher(tmp_path):
    """SIGTERM to all processes, the launcher too (which hands it on), then to one rank alone; then
    one rank that is lost: nobody can save, the launcher ends all."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_shards(data, samples=72)
    for die, batch in (("group-3", 3), ("one-5", 5)):
        status, told = launch(data, run, die)
        assert status == 0 and f"saved after batch {batch}" in told, (die, told[-3000:])
    assert launch(data, run, "lost-7")[0] != 0 and not (run / "end.pt").exists()
    for folder in (run, tmp_path / "whole"):
        assert launch(data, folder, "none")[0] == 0
    end, expected = (torch.load(folder / "end.pt") for folder in (run, tmp_path / "whole"))
    for name, weight in expected["weights"].items():
        assert torch.equal(end["weights"][name], weight), name
