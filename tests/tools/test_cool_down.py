"""A cool-down from a checkpoint: the YAML of `branch --cooldown`, trained beside its parent."""

from pathlib import Path

import pytest
import torch
import yaml
from composer.optim import ConstantScheduler, CosineAnnealingScheduler
from composer_run import assert_same_weights, make_trainer
from helpers import tiny_llama
from test_scheduler import Rates
from typer.testing import CliRunner

from apex_composer import APEX, StagewiseScheduler
from apex_composer.cli import app
from apex_composer.tools.branch import write_branch
from apex_composer.tools.checkpoint_file import read_checkpoint
from apex_composer.trainer.wsd import WSDScheduler

STAGES = ["2ba", "3ba", "1ba"]
LR = 3e-3
# What the parent is trained with; a cool-down reads the rate that came of it from the checkpoint.
SCHEDULERS = {
    "constant": ConstantScheduler(0.7),
    "cosine": CosineAnnealingScheduler(alpha_f=0.1),
    "stagewise": StagewiseScheduler(STAGES, lr_multipliers=[1.0, 0.4, 0.1]),
    "wsd": WSDScheduler("1ba", "4ba", "linear"),
}


def train(scheduler, apex=None, **options):
    """Train; returns the weights and the rates of all batches."""
    model, rates = tiny_llama(), Rates()
    trainer = make_trainer(
        *([] if apex is None else [APEX(**apex)]),
        model=model,
        schedulers=scheduler,
        callbacks=(rates,),
        lr=LR,
        **options,
    )
    trainer.fit()
    trainer.close()
    return dict(model.state_dict()), rates.seen


class Parent:
    """A run of 6 batches with a checkpoint of each, and what it was trained with."""

    def __init__(self, folder: Path, scheduler: str, **apex):
        self.folder, self.apex = folder, apex or None
        options = {"save_folder": str(folder / "parent"), "save_interval": "1ba"}
        self.weights, self.rates = train(SCHEDULERS[scheduler], self.apex, **options)
        config = {
            "run_name": "parent",
            "max_duration": "6ba",
            "save_folder": str(folder / "${run_name}"),
            "scheduler": {"name": scheduler, "t_warmup": "1ba"},
            "optimizer": {"lr": LR},
        }
        if self.apex:
            config["algorithms"] = {"apex": self.apex}
        (folder / "parent.yaml").write_text(yaml.safe_dump(config))

    def checkpoint(self, batch: int) -> Path:
        return self.folder / "parent" / f"ep0-ba{batch}-rank0.pt"

    def branch(self, batch: int, cooldown: str, *changes: str, name: str = "cool"):
        """The new run's YAML, and what the command tells of it."""
        out = self.folder / f"{name}.yaml"
        out.unlink(missing_ok=True)
        yamls = self.checkpoint(batch), self.folder / "parent.yaml", out
        written = write_branch(*yamls, changes, cooldown=cooldown)
        return yaml.safe_load(out.read_text()), written


def go_on(config: dict, **options):
    """Train what a YAML says."""
    settings = {"load_path": config["load_path"], "max_duration": config["max_duration"]}
    schedule = {name: value for name, value in config["scheduler"].items() if name != "name"}
    apex = config.get("algorithms", {}).get("apex")
    return train(WSDScheduler(**schedule), apex, **settings | options)


@pytest.fixture(scope="module")
def apex_parent(tmp_path_factory) -> Parent:
    return Parent(tmp_path_factory.mktemp("apex"), "constant", stages=STAGES, threshold=0.25)


@pytest.fixture(scope="module")
def plain_parent(tmp_path_factory) -> Parent:
    return Parent(tmp_path_factory.mktemp("plain"), "cosine")


@pytest.fixture(scope="module")
def stagewise_parent(tmp_path_factory) -> Parent:
    return Parent(tmp_path_factory.mktemp("stagewise"), "stagewise", stages=STAGES)


@pytest.fixture(scope="module")
def decaying_parent(tmp_path_factory) -> Parent:
    return Parent(tmp_path_factory.mktemp("decaying"), "wsd")


@pytest.mark.parametrize("kind", ["apex", "plain", "stagewise", "decaying"])
def test_the_decay_begins_at_the_rate_that_the_parent_had(request, tmp_path, kind):
    parent = request.getfixturevalue(f"{kind}_parent")
    config, written = parent.branch(4, "3ba", "scheduler.decay=linear")
    assert config["max_duration"] == "7ba"
    assert written.keeps_stage is (True if parent.apex else None)
    _, rates = go_on(config, save_folder=str(tmp_path), save_interval="1ba")
    assert rates[0] == rates[1] == parent.rates[4]  # Composer's schedulers are a batch late
    assert rates[2] == pytest.approx(rates[0] * 2 / 3)
    # The same batch, at the same rate: the same step.
    checkpoints = parent.checkpoint(5), tmp_path / "ep0-ba5-rank0.pt"
    assert_same_weights(*(torch.load(c, weights_only=False)["state"]["model"] for c in checkpoints))


@pytest.mark.parametrize("batch", [3, 5])
def test_a_lengthened_stage_is_that_of_a_run_laid_out_so(apex_parent, batch):
    """At batch 5 the last stage has just begun."""
    config, _ = apex_parent.branch(batch, "4ba")
    stages = {3: ["2ba", "5ba"], 5: ["2ba", "3ba", "4ba"]}[batch]
    assert config["algorithms"]["apex"]["stages"] == stages
    weights, _ = go_on(config)
    whole, _ = train(
        WSDScheduler(t_decay="4ba", alpha_i=0.7),
        apex_parent.apex | {"stages": stages},
        max_duration=f"{batch + 4}ba",
    )
    assert_same_weights(weights, whole)


def test_a_shortened_stage_keeps_its_operators_too(apex_parent):
    config, written = apex_parent.branch(3, "1ba")
    assert written.keeps_stage and config["algorithms"]["apex"]["stages"] == ["2ba", "2ba"]
    weights, _ = go_on(config)
    at_four = torch.load(apex_parent.checkpoint(4), weights_only=False)["state"]["model"]
    assert_same_weights({f"model.{name}": w for name, w in weights.items()}, at_four)


def test_a_run_that_is_over_gets_one_more_stage(apex_parent):
    config, _ = apex_parent.branch(6, "2ba")
    assert config["algorithms"]["apex"]["stages"] == [*STAGES, "2ba"]
    folder = apex_parent.folder / "after"
    go_on(config, save_folder=str(folder), save_interval="1ba")
    last = read_checkpoint(folder / "ep0-ba8-rank0.pt")
    assert [record["start_batch"] for record in last.apex["history"]] == [0, 2, 5, 6]
    assert last.apex["lineage"][0]["changed"]["max_duration"] == ["6ba", "8ba"]


@pytest.mark.parametrize("kind", ["apex_parent", "plain_parent"])
def test_a_cool_down_that_is_resumed_goes_on_bit_for_bit(kind, request, tmp_path):
    config, _ = request.getfixturevalue(kind).branch(3, "4ba")
    weights, _ = go_on(config, save_folder=str(tmp_path), save_interval="1ba")
    again, rates = go_on(config, load_path=str(tmp_path / "ep0-ba5-rank0.pt"))
    assert_same_weights(weights, again)
    assert len(rates) == 2


def test_stages_without_operators_stay_without(tmp_path):
    stages = ["2ba", {"duration": "4ba", "expansion": False}]
    parent = Parent(tmp_path, "constant", stages=stages)
    config, written = parent.branch(3, "2ba")
    assert config["algorithms"]["apex"]["stages"] == [
        "2ba",
        {"duration": "3ba", "expansion": False},
    ]
    assert written.keeps_stage
    config, _ = parent.branch(6, "2ba")
    assert config["algorithms"]["apex"]["stages"][2] == {"duration": "2ba", "expansion": False}


def test_a_run_that_trains_rows_cools_down_in_its_stage(tmp_path):
    parent = Parent(tmp_path, "constant", stages=STAGES, trainable="selected")
    config, written = parent.branch(4, "2ba")
    assert written.keeps_stage
    _, rates = go_on(config)
    assert rates[0] == parent.rates[4]


def test_the_command_tells_what_it_wrote(plain_parent, monkeypatch):
    monkeypatch.chdir(plain_parent.folder)
    monkeypatch.setattr("apex_composer.tools.commands.console._width", 200)
    checkpoint = "parent/ep0-ba4-rank0.pt"
    arguments = ["branch", checkpoint, "--yaml", "parent.yaml", "--out", "told.yaml"]
    result = CliRunner().invoke(app, [*arguments, "--cooldown", "2ba"])
    assert result.exit_code == 0, result.output
    for told in (
        "run 'told' goes on from batch 4",
        "max_duration: 6ba -> 6ba",
        "{'name': 'cosine', 't_warmup': '1ba'} -> {'name': 'wsd', 't_decay': '2ba', 'alpha_i': 0.",
        "A run without apex: where it comes from stands in its YAML (metadata.lineage)",
    ):
        assert told in result.output, result.output


def test_a_run_without_apex_keeps_its_lineage_in_the_yaml(plain_parent):
    config, written = plain_parent.branch(4, "2ba")
    assert config["metadata"]["lineage"] == [written.point]
    assert written.point["batch"] == 4 and "algorithms" not in config
    second = plain_parent.folder / "second.yaml"
    cool = plain_parent.folder / "cool.yaml"
    again = write_branch(plain_parent.checkpoint(5), cool, second, ["max_duration=9ba"])
    lineage = yaml.safe_load(second.read_text())["metadata"]["lineage"]
    assert lineage == [written.point, again.point]
    assert again.keeps_stage is None


def test_a_run_in_another_unit_branches_without_a_cool_down(plain_parent, tmp_path):
    yamls = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    config = {"run_name": "parent", "max_duration": "1h", "scheduler": {"name": "cosine"}}
    yamls[0].write_text(yaml.safe_dump(config))
    write_branch(plain_parent.checkpoint(4), *yamls, ["seed=3"])
    assert yaml.safe_load(yamls[1].read_text())["max_duration"] == "1h"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("max_duration=9ba", "^--set max_duration: not with --cooldown, which decides"),
        (
            "scheduler.t_decay=1ba",
            "^--set scheduler.t_decay: .* Allowed of these: scheduler.decay, scheduler.alpha_f",
        ),
        ("scheduler.decay=square", "^decay: got 'square', allowed: 1-sqrt, linear, cosine"),
        ("scheduler.alpha_f=0.9", "^alpha_f: got 0.9, allowed: no more than alpha_i"),
        ("scheduler.name=linear", "^--set scheduler.name: not with --cooldown"),
        ("optimizer.lr=1", "^--set optimizer.lr: Composer restores the optimizer's settings"),
        ("save_folder=parent", "^save_folder: got parent, the folder of the parent's"),
    ],
)
def test_changes_that_contradict_it_are_refused(plain_parent, monkeypatch, change, told):
    monkeypatch.chdir(plain_parent.folder)
    with pytest.raises(ValueError, match=told):
        plain_parent.branch(4, "1ba", change, name="refused")
    assert not (plain_parent.folder / "refused.yaml").exists()


VARIABLES = {
    "variables": {"lr": LR, "length": "6ba", "runs": "elsewhere", "batch": 4},
    "optimizer": {"lr": "${variables.lr}"},
    "max_duration": "${variables.length}",
    "max_seq_len": 8,
    "global_train_batch_size": "${variables.batch}",
}


@pytest.mark.parametrize(
    ("changed", "change", "told"),
    [
        ({}, "variables.lr=1", "^--set of what `optimizer` refers to: Composer restores"),
        ({}, "variables.length=9ba", "^--set variables.length: .* it changes max_duration by a"),
        ({}, "variables.batch=8", "of this run not all batches have 64tok"),
        ({}, "load_ignore_keys=[state/timestamp]", "^--set load_ignore_keys: not with branch"),
        ({}, "load_weights_only=true", "^--set load_weights_only: not with branch"),
        ({"save_folder": "s3://b/run"}, "seed=2", "^save_folder: got s3://b/run, the folder of"),
        ({"save_folder": "old/{run_name}"}, "run_name=parent", "^save_folder: got old/parent"),
        (
            {"callbacks": {"hf_checkpointer": {"save_folder": "runs/hf"}}},
            "seed=2",
            "^callbacks.hf_checkpointer.save_folder: got runs/hf, the folder of the parent's",
        ),
        (
            {"loggers": {"local_metrics": {"folder": "metrics"}}},
            "seed=2",
            "^loggers.local_metrics.folder: got metrics, the folder of the parent's",
        ),
    ],
)
def test_what_would_be_ignored_or_replaced_in_silence_is_refused(
    plain_parent, tmp_path, changed, change, told
):
    """Through references, and in folders that are not the checkpoint's."""
    yamls = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    config = {"run_name": "parent", "scheduler": {"name": "cosine"}, **VARIABLES, **changed}
    yamls[0].write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=told):
        write_branch(plain_parent.checkpoint(4), *yamls, [change], cooldown="64tok")


def test_a_yaml_of_the_other_kind_is_refused(plain_parent, apex_parent, tmp_path):
    for one, other in ((plain_parent, apex_parent), (apex_parent, plain_parent)):
        with pytest.raises(ValueError, match=r"^algorithms.apex: .* has it and .* has not"):
            yamls = one.checkpoint(3), other.folder / "parent.yaml", tmp_path / "b.yaml"
            write_branch(*yamls, [], cooldown="1ba")


def test_weights_alone_cannot_cool_down(plain_parent, tmp_path):
    options = {"save_folder": str(tmp_path), "save_weights_only": True, "max_duration": "1ba"}
    train(ConstantScheduler(), **options)
    with pytest.raises(ValueError, match="holds weights only .save_weights_only: true."):
        write_branch(
            tmp_path / "ep0-ba1-rank0.pt",
            plain_parent.folder / "parent.yaml",
            tmp_path / "b.yaml",
            [],
            cooldown="1ba",
        )
