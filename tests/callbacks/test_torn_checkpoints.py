"""Torn checkpoints and lagging links, made by hand and by Composer's own saver."""

import os

import pytest
import torch
from composer.utils import checkpoint as composer_checkpoint
from composer_run import make_trainer
from helpers import tiny_llama

from apex_composer import APEX
from apex_composer.callbacks.preemption import Preemption
from apex_composer.callbacks.torn_checkpoints import repair

NAMES = ("ep{epoch}-ba{batch}-rank{rank}.pt", "latest-rank{rank}.pt")
LINK = "latest-rank0.pt"


def make(folder, whole=(), torn=(), latest=None):
    for batch in (*whole, *torn):
        torch.save({"batch": batch}, folder / f"ep0-ba{batch}-rank0.pt")
    for batch in torn:
        path = folder / f"ep0-ba{batch}-rank0.pt"
        path.write_bytes(path.read_bytes()[:-30])
    if latest is not None:
        (folder / LINK).symlink_to(f"ep0-ba{latest}-rank0.pt")


@pytest.mark.parametrize(
    ("given", "target", "sentences"),
    [
        ({"whole": (2, 10), "latest": 10}, 10, 0),
        ({"whole": (2, 10), "torn": (11,), "latest": 10}, 10, 1),
        ({"whole": (2, 10)}, 10, 1),  # killed between removing the link and making it
        ({"whole": (2,), "torn": (10,), "latest": 10}, 2, 2),  # lost by the file system
        ({"torn": (1,), "latest": 1}, None, 2),
        ({"torn": (1,)}, None, 1),
        ({}, None, 0),
    ],
)
def test_the_link_points_to_the_newest_whole_checkpoint(tmp_path, given, target, sentences):
    make(tmp_path, **given)
    done = repair(tmp_path, *NAMES)
    assert len(done) == sentences, done
    link = tmp_path / LINK
    assert not link.is_symlink() if target is None else torch.load(link) == {"batch": target}
    left = sorted(path.name for path in tmp_path.glob("ep*.pt"))
    assert left == sorted(f"ep0-ba{batch}-rank0.pt" for batch in given.get("whole", ()))
    assert len(list(tmp_path.glob("*.torn"))) == len(given.get("torn", ()))
    assert repair(tmp_path, *NAMES) == []


def test_a_whole_file_younger_than_the_link_is_taken(tmp_path):
    make(tmp_path, whole=(2, 3), latest=2)
    os.utime(tmp_path / LINK, (1, 1), follow_symlinks=False)
    assert len(repair(tmp_path, *NAMES)) == 1
    assert torch.load(tmp_path / LINK) == {"batch": 3}


def test_a_link_that_somebody_has_set_back_is_left(tmp_path):
    make(tmp_path, whole=(2, 3), latest=2)
    for batch in (2, 3):
        os.utime(tmp_path / f"ep0-ba{batch}-rank0.pt", (1, 1))
    assert repair(tmp_path, *NAMES) == []


@pytest.mark.parametrize("filename", ["last.pt", "ba{batch}/rank{rank}", "ba{batch}.pt.gz"])
def test_other_kinds_of_checkpoints_are_left_alone(tmp_path, filename):
    make(tmp_path, torn=(1,))
    assert repair(tmp_path, filename, LINK) == []
    assert repair(tmp_path / "missing", *NAMES) == []


def test_sharded_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "ep0-ba3").mkdir()
    (tmp_path / LINK).symlink_to("ep0-ba3")
    assert repair(tmp_path, *NAMES) == []
    assert (tmp_path / LINK).readlink().name == "ep0-ba3"


class KilledError(Exception):
    """Stands for SIGKILL; `test_killed_runs.py` has the real one."""


def train(folder, *callbacks):
    apex, model = APEX(stages=["2ba", "4ba"]), tiny_llama()
    trainer = make_trainer(
        apex,
        model=model,
        callbacks=callbacks,
        run_name="torn",
        autoresume=True,
        save_folder=str(folder),
        save_interval="1ba",
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return dict(model.state_dict())


def killed_in_a_save(folder, monkeypatch):
    """A run whose third checkpoint is cut off in the middle."""
    write = composer_checkpoint._write_checkpoint_file

    def cut(state, filename):
        write(state, filename)
        if "ba3" in filename:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(composer_checkpoint, "_write_checkpoint_file", cut)
        train(folder)


def test_composer_alone_cannot_go_on_after_a_torn_save(tmp_path, monkeypatch):
    """Why `repair` exists; where this fails, Composer has learnt it and `repair` may go."""
    killed_in_a_save(tmp_path, monkeypatch)
    with pytest.raises(FileExistsError, match="ep0-ba3-rank0.pt may conflict"):
        train(tmp_path)


def test_a_torn_save_is_put_aside_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    expected = train(tmp_path / "whole")
    killed_in_a_save(tmp_path / "torn", monkeypatch)
    weights = train(tmp_path / "torn", Preemption())
    assert "ep0-ba3-rank0.pt is torn" in capfd.readouterr().err
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
