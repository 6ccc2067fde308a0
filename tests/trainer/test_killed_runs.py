"""A run killed at any batch and resumed gives the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer.models import HuggingFaceModel
from composer_run import make_trainer
from helpers import tiny_llama
from tiny_run import write_shards

from apex_composer import APEX

WORKER = Path(__file__).with_name("resume_worker.py")
# Stages end at 4 and 7. The kill comes at a batch's end, before its checkpoint: inside a stage,
# on the boundary (resumes before it), and one after (resumes from the boundary's checkpoint,
# which holds the next stage's fresh operators).
KILLS = {"inside": 3, "boundary": 4, "one_after": 5}


KILLED = -signal.SIGKILL


def train(data: Path, *runs: tuple[Path, str]) -> list[int]:
    """Let the worker run to its ends or deaths, in these folders; returns exit statuses."""
    arguments = [str(part) for run in runs for part in run]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(data), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def end_of(folder: Path) -> dict:
    return torch.load(folder / "end.pt", weights_only=True)


def assert_same_end(folder: Path, whole: Path) -> None:
    end, expected = end_of(folder), end_of(whole)
    assert end["history"] == expected["history"], folder.name
    for key, weight in expected["weights"].items():
        assert torch.equal(end["weights"][key], weight), (folder.name, key)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """36 samples as MDS: one epoch of nine batches."""
    folder = tmp_path_factory.mktemp("data") / "mds"
    write_shards(folder, samples=36)
    return folder


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    whole, runs = tmp_path / "whole", [(tmp_path / "whole", "none")]
    for name, batch in KILLS.items():
        runs += [(tmp_path / name, f"kill-{batch}"), (tmp_path / name, "none")]
    assert train(data, *runs) == [0] + [KILLED, 0] * len(KILLS)
    assert [record["start_batch"] for record in end_of(whole)["history"]] == [0, 4, 7]
    for name, batch in KILLS.items():
        assert end_of(tmp_path / name)["began"] == batch - 1
        assert_same_end(tmp_path / name, whole)


@pytest.mark.long
def test_killed_anywhere_any_number_of_times(data, tmp_path):
    """Fourteen SIGKILLs over four runs: after batches, in saves, in the first assessment."""
    assert train(data, (tmp_path / "whole", "none"), (tmp_path / "again", "none")) == [0, 0]
    draw = random.Random(0)
    for run in range(4):
        folder = tmp_path / str(run)
        kills = ["assess-0"] if run % 2 else []
        for batch in sorted(draw.sample(range(1, 10), 3)):
            kills.append(f"{draw.choice(['kill', 'save'])}-{batch}")
        print(f"run {run}: {', '.join(kills)}")
        statuses = train(data, *((folder, kill) for kill in [*kills, "none"]))
        assert statuses == [KILLED] * len(kills) + [0], kills
        assert_same_end(folder, tmp_path / "whole")


def save_at_batch_three(folder: Path, *algorithms) -> Path:
    """A checkpoint in the middle of a six-batch run of two stages."""
    trainer = make_trainer(
        *algorithms, save_folder=str(folder), save_interval="3ba", max_duration="6ba"
    )
    trainer.fit()
    trainer.close()
    return folder / "ep0-ba3-rank0.pt"


def load(checkpoint: Path, apex: APEX, **options):
    trainer = make_trainer(apex, load_path=str(checkpoint), max_duration="6ba", **options)
    trainer.fit()
    trainer.close()


def test_a_checkpoint_is_an_ordinary_one(tmp_path):
    """Mid-stage: the vanilla run's model and optimizer keys and shapes, plain data besides."""
    states = []
    for name, algorithms in (("vanilla", []), ("apex", [APEX(stages=["4ba", "2ba"])])):
        checkpoint = save_at_batch_three(tmp_path / name, *algorithms)
        states.append(torch.load(checkpoint, weights_only=False)["state"])
    vanilla, apex = states

    def shapes(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        return [shapes(item) for item in value] if isinstance(value, list) else type(value)

    assert shapes(apex["model"]) == shapes(vanilla["model"])
    assert shapes(apex["optimizers"]) == shapes(vanilla["optimizers"])
    assert any(
        not torch.equal(apex["model"][name], weight) for name, weight in vanilla["model"].items()
    )
    own = dict(apex["algorithms"])["APEX"]
    assert own["apex"]["factors"]
    torch.save(own, tmp_path / "own.pt")
    assert torch.load(tmp_path / "own.pt", weights_only=True)["apex"]["stages"]["ends"] == [4, 6]
    # It evaluates without this package: plain Composer loads the weights.
    plain = HuggingFaceModel(tiny_llama(seed=1), tokenizer=None, use_logits=True)
    plain.load_state_dict(apex["model"])


def test_resuming_with_other_settings_names_both(tmp_path):
    checkpoint = save_at_batch_three(tmp_path, APEX(stages=["4ba", "2ba"]))
    for settings, message in (
        ({"stages": ["5ba", "1ba"]}, r"stages: .*'4ba'.*'5ba'"),
        ({"stages": ["4ba", "2ba"], "threshold": 0.25}, r"threshold: .*0\.125.*0\.25"),
        ({"stages": ["4ba", "2ba"], "targets": ["channel"]}, r"targets: .*'head'.*'channel'"),
        ({"stages": ["4ba", "2ba"], "seed": 1}, r"seed: .*17.*1"),
    ):
        with pytest.raises(ValueError, match=message):
            load(checkpoint, APEX(**settings))


def test_a_checkpoint_without_its_apex_state_starts_the_stage_anew(tmp_path):
    checkpoint = save_at_batch_three(tmp_path, APEX(stages=["2ba", "4ba"]))
    apex = APEX(stages=["2ba", "4ba"])
    with pytest.warns(UserWarning, match="batch 3 was loaded without the state of apex"):
        load(checkpoint, apex, load_ignore_keys=["state/algorithms*"])
    assert [(r["stage"], r["start_batch"]) for r in apex.history] == [(1, 3)]


def test_weights_alone_start_a_fresh_run(tmp_path):
    checkpoint = save_at_batch_three(tmp_path, APEX(stages=["4ba", "2ba"]))
    apex = APEX(stages=2, threshold=0.25)
    load(checkpoint, apex, load_weights_only=True)
    assert [r["start_batch"] for r in apex.history] == [0, 3]
