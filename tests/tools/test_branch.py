"""`apex-composer branch` and `show`, from a real checkpoint to a run that trains."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from composer_run import make_trainer
from tqdm import tqdm
from typer.testing import CliRunner

from apex_composer import APEX
from apex_composer.cli import app
from apex_composer.tools import commands
from apex_composer.tools.checkpoint_file import hash_file, read_checkpoint

STAGES = ["2ba", "3ba"]
CONFIG = {
    "variables": {"stages": STAGES},
    "run_name": "parent",
    "max_duration": "5ba",
    "save_folder": "runs/${run_name}/checkpoints",
    "load_ignore_keys": ["state/callbacks"],
    "algorithms": [{"apex": {"threshold": 0.25, "stages": "${variables.stages}"}}],
    "optimizer": {"lr": 1e-2},
}


def train_parent(folder: Path, **settings) -> Path:
    apex = APEX(stages=STAGES, threshold=0.25, **settings)
    checkpoints = folder / "runs" / "parent" / "checkpoints"
    trainer = make_trainer(
        apex, max_duration="5ba", save_folder=str(checkpoints), save_interval="1ba"
    )
    trainer.fit()
    trainer.close()
    own = {**CONFIG["algorithms"][0]["apex"], **settings}
    config = CONFIG | {"algorithms": [{"apex": own}]}
    (folder / "parent.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """The folder of a run: its YAML, and checkpoints of every batch."""
    return train_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def rows_parent(tmp_path_factory) -> Path:
    """The same of a run that trains rows only, with a threshold that was solved for a share."""
    return train_parent(tmp_path_factory.mktemp("rows"), trainable="selected", trainable_share=0.3)


@pytest.fixture
def invoke(parent, monkeypatch, tmp_path):
    """Call a command of the package in the parent's folder; returns status and text."""
    monkeypatch.chdir(parent)
    monkeypatch.setattr("apex_composer.tools.commands.console._width", 200)

    def call(*arguments):
        result = CliRunner().invoke(
            app, [str(argument) for argument in arguments], catch_exceptions=False
        )
        return result.exit_code, result.output

    return call


def checkpoint(batch: int) -> str:
    return f"runs/parent/checkpoints/ep0-ba{batch}-rank0.pt"


def branch_arguments(batch: int, out: Path, *changes: str) -> list:
    sets = [part for change in changes for part in ("--set", change)]
    return ["branch", checkpoint(batch), "--yaml", "parent.yaml", "--out", out, *sets]


def test_a_branch_is_a_yaml_that_trains(parent, invoke, tmp_path):
    out = tmp_path / "wider.yaml"
    status, text = invoke(*branch_arguments(3, out, "algorithms.apex.threshold=0.5"))
    assert status == 0, text
    assert "algorithms.apex.threshold: 0.25 -> 0.5" in text and "new stage begin" in text
    config = yaml.safe_load(out.read_text())
    assert config["run_name"] == "wider" and "load_ignore_keys" not in config
    assert config["load_path"] == str((parent / checkpoint(3)).resolve())
    settings = config["algorithms"]["apex"]
    assert settings["stages"] == "${variables.stages}"
    point = settings["branch"]
    assert point["sha256"] == hash_file(parent / checkpoint(3))
    assert (point["batch"], point["stage"]) == (3, 1)
    apex = APEX(**settings | {"stages": STAGES})
    trainer = make_trainer(
        apex,
        load_path=config["load_path"],
        max_duration="5ba",
        save_folder=str(tmp_path / "wider"),
        save_interval="1ba",
    )
    trainer.fit()
    trainer.close()
    assert apex.lineage == [point]
    status, text = invoke("show", tmp_path / "wider" / "ep0-ba4-rank0.pt")
    assert status == 0
    assert "stage 1 (of 0 to 1), up to 5ba, 14 operators" in text
    assert "algorithms.apex.threshold: 0.25 -> 0.5" in text and point["sha256"][:12] in text
    rows = [re.findall(r"[^│\s][^│]*", line) for line in text.splitlines() if "samples" in line]
    starts = [row[2].strip() for row in rows if len(row) == 6]
    assert starts == ["0", "2", "3"]


def test_the_checkpoint_is_hashed_behind_a_bar(parent, invoke, tmp_path, monkeypatch):
    shown, spinners = [], []

    @contextmanager
    def spinner(text):
        spinners.append(text)
        yield
        spinners.pop()

    class Bar(tqdm):
        def update(self, n=1):
            shown.append((self.total, n, len(spinners)))
            return super().update(n)

    monkeypatch.setattr(commands.console, "status", spinner)

    monkeypatch.setattr("apex_composer.data_prep.progress.tqdm", Bar)
    assert invoke(*branch_arguments(3, tmp_path / "child.yaml"))[0] == 0
    size = (parent / checkpoint(3)).stat().st_size
    assert sum(n for _, n, _ in shown) == size
    assert {(total, live) for total, _, live in shown} == {(size, 0)}  # no spinner over the bar


def test_show_tells_the_end_of_a_run(invoke):
    status, text = invoke("show", checkpoint(5))
    assert status == 0 and "all 2 stages are over" in text and "lineage" not in text
    assert read_checkpoint(checkpoint(2)).ended == 1


def test_a_branch_in_its_stage_goes_on(invoke, tmp_path):
    changes = ("optimizer.lr=0.005", "run_name=slower")
    status, text = invoke(*branch_arguments(3, tmp_path / "b.yaml", *changes))
    assert status == 0 and "Stage 1 goes on with its operators" in text
    assert yaml.safe_load((tmp_path / "b.yaml").read_text())["run_name"] == "slower"


def go_on(settings: dict, load_path: str) -> APEX:
    apex = APEX(**settings | {"stages": STAGES})
    trainer = make_trainer(apex, load_path=load_path, max_duration="5ba")
    assert len(trainer.state.optimizers[0].state) == 1  # for a checkpoint of its own
    trainer.fit()
    trainer.close()
    return apex


def test_a_branch_of_a_run_that_trains_rows(rows_parent, invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(rows_parent)
    status, text = invoke(*branch_arguments(3, tmp_path / "same.yaml", "optimizer.lr=0.005"))
    assert status == 0 and "Stage 1 goes on with its operators" in text
    out = tmp_path / "more.yaml"
    status, text = invoke(*branch_arguments(3, out, "algorithms.apex.trainable_share=0.5"))
    assert status == 0 and "algorithms.apex.trainable_share: 0.3 -> 0.5" in text
    config = yaml.safe_load(out.read_text())
    apex = go_on(config["algorithms"]["apex"], config["load_path"])
    assert [record["start_batch"] for record in apex.history] == [0, 2, 3]
    assert apex._expander.share.trained > 0.45 * apex._expander.share.total
    rows = apex._expander.state_dict()["rows"].values()
    steps = torch.cat([moments[2] for own in rows for moments in own["moments"]])
    assert steps.unique().tolist() == [2, 3, 5]  # of rows that are new, and that have stayed
    out = tmp_path / "half.yaml"
    status, text = invoke(*branch_arguments(3, out, "algorithms.apex.trainable=half"))
    assert status == 1 and "'selected', this run says 'half', and the optimizer in the" in text
    assert not out.exists()


def test_a_run_that_trains_rows_branches_off_one_that_trains_all(invoke, tmp_path):
    out = tmp_path / "rows.yaml"
    status, text = invoke(*branch_arguments(3, out, "algorithms.apex.trainable=selected"))
    assert status == 0 and "new stage begin" in text
    config = yaml.safe_load(out.read_text())
    apex = go_on(config["algorithms"]["apex"], config["load_path"])
    assert [record["start_batch"] for record in apex.history] == [0, 2, 3]


@pytest.mark.parametrize(
    ("batch", "changes", "told"),
    [
        (3, ["algorithms.apex.threshold=0.7"], "threshold: got 0.7, allowed: a number in"),
        (3, ["algorithms.apex.treshold=0.3"], "Did you mean 'threshold'"),
        (3, ["max_duration=9ba"], "stages: they end at .*shorter than training"),
        (5, ["algorithms.apex.threshold=0.5"], "max_duration: got 5ba, .* is at batch 5 already"),
        (3, ["run_name=parent"], "save_folder: got .*the folder of the parent"),
    ],
)
def test_settings_that_cannot_work_are_refused(invoke, tmp_path, batch, changes, told):
    out = tmp_path / "b.yaml"
    status, text = invoke(*branch_arguments(batch, out, *changes))
    assert status == 1 and re.search(told, text), text
    assert not out.exists()


def test_a_yaml_of_another_run_is_refused(invoke, tmp_path, parent):
    other = CONFIG | {"algorithms": [{"apex": {"stages": STAGES}}]}
    (parent / "other.yaml").write_text(yaml.safe_dump(other))
    arguments = branch_arguments(3, tmp_path / "b.yaml")
    arguments[3] = "other.yaml"
    status, text = invoke(*arguments)
    assert status == 1 and "says 0.125, but" in text and "trained with 0.25" in text


@pytest.mark.parametrize(
    ("changed", "more", "told"),
    [
        ({"optimizer": {"lr": 3e-3}}, [], "optimizer.lr: other.yaml says 0.003, but .* with 0.01"),
        ({"optimizer": {"lr": 3e-3}}, ["--cooldown", "3ba"], "optimizer.lr: other.yaml says 0.003"),
        (
            {"global_train_batch_size": 64},
            [],
            "says 64, but .* trained 12 samples in 3 batches",
        ),
    ],
)
def test_a_yaml_without_what_the_parents_command_line_had_is_refused(
    invoke, tmp_path, parent, changed, more, told
):
    """A cool-down would begin at a share of the file's rate, where the run has another one."""
    (parent / "other.yaml").write_text(yaml.safe_dump(CONFIG | changed))
    arguments = branch_arguments(3, tmp_path / "b.yaml")
    arguments[3] = "other.yaml"
    status, text = invoke(*arguments, *more)
    assert status == 1 and re.search(told, text.replace("\n", " ")), text
    assert not (tmp_path / "b.yaml").exists()
    if "global_train_batch_size" in changed:  # the run itself may have changed it
        assert invoke(*arguments, "--set", "global_train_batch_size=8")[0] == 0


def test_an_existing_file_is_not_replaced(invoke, tmp_path):
    (tmp_path / "b.yaml").write_text("")
    arguments = branch_arguments(3, tmp_path / "b.yaml")
    status, text = invoke(*arguments)
    assert status == 1 and "exists: give another --out" in text
    assert invoke(*arguments, "--overwrite")[0] == 0


def test_what_is_no_checkpoint_is_refused(invoke, tmp_path, parent):
    torn = tmp_path / "torn.pt"
    torn.write_bytes((parent / checkpoint(3)).read_bytes()[:-100])
    for path, told in (
        (torn, "cannot be read as a Composer checkpoint"),
        (tmp_path / "none.pt", "does not exist"),
        (tmp_path, "is a folder .a sharded checkpoint"),
    ):
        status, text = invoke("show", path)
        assert status == 1 and re.search(told, text), text


def test_a_checkpoint_without_apex_is_refused(invoke, tmp_path):
    trainer = make_trainer(save_folder=str(tmp_path), save_interval="1ba", max_duration="1ba")
    trainer.fit()
    trainer.close()
    status, text = invoke("show", tmp_path / "ep0-ba1-rank0.pt")
    assert status == 1 and "holds no state of apex" in text
