"""A resumed run's optimizer is that of its settings, and otherwise what the checkpoint left."""

import warnings
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.optim import CosineAnnealingWithWarmupScheduler, DecoupledAdamW
from composer_run import make_trainer
from helpers import tiny_llama
from llmfoundry.optim import DecoupledLionW

from apex_composer import APEX, StagewiseScheduler
from apex_composer.optimizer_settings import put_back, read_settings

GIVEN = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def optimizer_of(**settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **{**GIVEN, **settings})


def resumed(trained: dict, now: dict, *, moved: dict | None = None, recorded: bool = True):
    """An optimizer after loading another's state; `moved` by training, not by settings."""
    first, second = optimizer_of(**trained), optimizer_of(**now)
    settings, given = read_settings(first), read_settings(second)
    first.param_groups[0].update(moved or {})
    second.load_state_dict(first.state_dict())
    put_back(second, given, settings if recorded else None, [])
    return second.param_groups[0]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older checkpoint"])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("weight_decay", 0.2, "weight_decay: the checkpoint was trained with 0.1, .* says 0.2"),
        ("betas", (0.8, 0.95), r"betas: .* with \[0.9, 0.95\], this run says \[0.8, 0.95\]"),
        ("eps", 1e-6, "eps: .* with 1e-08, this run says 1e-06, which holds from here on"),
        ("maximize", True, "maximize: .* with False, this run says True"),
        ("lr", 2e-2, "lr: .* with 0.01, this run says 0.02"),
    ],
)
def test_a_changed_setting_is_put_back_with_a_warning(name, value, told, recorded):
    with pytest.warns(UserWarning, match=told):
        group = resumed({}, {name: value}, recorded=recorded)
    assert group[name] == value and type(group[name]) is type(value)


@pytest.mark.parametrize("recorded", [True, False])
def test_unchanged_settings_are_left_alone_in_silence(recorded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = resumed({}, {}, recorded=recorded)
    assert {name: group[name] for name in GIVEN} == GIVEN


def test_what_training_has_moved_stays():
    """Schedules of weight decay or momentum, and counters that optimizers keep in groups."""
    moved = {"weight_decay": 0.05, "betas": (0.7, 0.95), "k": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = resumed({}, {}, moved=moved)
    assert {name: group[name] for name in moved} == moved


def test_a_rate_keeps_its_place_in_the_schedule():
    """Base 0.01 at a quarter: with base 0.02 a quarter too, and for the schedulers as well."""
    first, second = optimizer_of(), optimizer_of(lr=2e-2)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0) for o in (first, second)]
    trained, given = read_settings(first), read_settings(second)
    first.param_groups[0]["lr"] = 0.0025
    second.load_state_dict(first.state_dict())
    schedulers[1].load_state_dict(schedulers[0].state_dict())
    with pytest.warns(UserWarning, match="^lr: "):
        put_back(second, given, trained, schedulers[1:])
    assert second.param_groups[0]["lr"] == pytest.approx(0.005)
    assert second.param_groups[0]["initial_lr"] == 0.02 and schedulers[1].base_lrs == [0.02]


def test_a_scheduler_may_be_new():
    """Optimizers without one have no base rate."""
    first, second = optimizer_of(), optimizer_of(weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(second, lambda _: 0.5)
    given = read_settings(second)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="^weight_decay: "):
        put_back(second, given, None, [scheduler])
    assert scheduler.base_lrs == [0.01]


@pytest.mark.parametrize("name", ["amsgrad", "foreach"])
def test_what_does_not_fit_the_moments_stays_with_a_warning(name):
    with pytest.warns(UserWarning, match=f"{name}: .*says True, but .*load_weights_only"):
        group = resumed({name: False}, {name: True})
    assert group[name] is False


def test_what_needs_moments_can_be_turned_off():
    with pytest.warns(UserWarning, match="amsgrad: .*with True, this run says False, which holds"):
        assert resumed({"amsgrad": True}, {"amsgrad": False})["amsgrad"] is False


def test_settings_are_plain_data():
    settings = read_settings(DecoupledAdamW([torch.nn.Parameter(torch.ones(2))], **GIVEN))
    assert settings == [{**GIVEN, "betas": [0.9, 0.95], "amsgrad": False} | settings[0]]
    assert "params" not in settings[0] and "initial_lr" not in settings[0]


# Under the trainer: the optimizers of torch, Composer and llm-foundry, with and without stagewise.
OPTIMIZERS = {
    "torch": torch.optim.AdamW,
    "composer": DecoupledAdamW,
    "llmfoundry": DecoupledLionW,
}
SCHEDULERS = {
    "none": lambda: None,
    "cosine": lambda: CosineAnnealingWithWarmupScheduler("2ba"),
    "stagewise": lambda: StagewiseScheduler(2, lr_multipliers=[1.0, 0.5]),
}


class SetAt(Callback):
    """Changes param groups at the start of a batch, as resuming there would."""

    def __init__(self, batch: int, **values):
        self.batch, self.values = batch, values

    def batch_start(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            state.optimizers[0].param_groups[0].update(self.values)


def train(optimizer: str, scheduler: str, *callbacks, apex=True, **options) -> dict:
    """Six batches; the weights at their end."""
    settings = {"lr": 1e-2, "weight_decay": 1e-4, **options.pop("settings", {})}
    model = tiny_llama()
    trainer = make_trainer(
        *([APEX(stages=2)] if apex else []),
        model=model,
        optimizer=OPTIMIZERS[optimizer],
        settings=settings,
        schedulers=SCHEDULERS[scheduler](),
        callbacks=callbacks,
        **options,
    )
    trainer.fit()
    trainer.close()
    return dict(model.state_dict())


def checkpoint(folder: Path, *args, **options) -> str:
    train(*args, save_folder=str(folder), save_interval="4ba", **options)
    return str(folder / "ep0-ba4-rank0.pt")


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "apex"),
    [
        ("torch", "none", True),
        ("composer", "cosine", True),
        ("llmfoundry", "stagewise", True),
        ("torch", "stagewise", False),
    ],
)
def test_a_resumed_run_is_what_its_settings_say(optimizer, scheduler, apex, tmp_path):
    kind = optimizer, scheduler
    changed = {"weight_decay": 0.3, "betas": (0.8, 0.9)}
    expected = train(*kind, SetAt(4, **changed), apex=apex)
    unchanged = train(*kind, apex=apex)
    path = checkpoint(tmp_path, *kind, apex=apex)
    with pytest.warns(UserWarning, match="betas: .*; weight_decay: .* 0.0001, .* 0.3"):
        found = train(*kind, apex=apex, settings=changed, load_path=path)
    same = train(*kind, apex=apex, load_path=path)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert torch.equal(same[name], unchanged[name]), name
    assert any(not torch.equal(expected[name], unchanged[name]) for name in expected)


def test_another_rate_counts_at_once_without_stagewise(tmp_path):
    """The decoupled weight decay too, which goes with lr over its base."""
    kind = "composer", "none"
    expected = train(*kind, SetAt(4, lr=5e-3, initial_lr=5e-3))
    path = checkpoint(tmp_path, *kind)
    with pytest.warns(UserWarning, match="lr: .* 0.01, this run says 0.005"):
        found = train(*kind, settings={"lr": 5e-3}, load_path=path)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_change_holds_for_the_next_resume_too(tmp_path):
    """The second run's settings are what its checkpoints remember."""
    kind = "torch", "none"
    path = checkpoint(tmp_path / "first", *kind)
    with pytest.warns(UserWarning, match="weight_decay"):
        expected = train(
            *kind,
            settings={"weight_decay": 0.3},
            load_path=path,
            save_folder=str(tmp_path / "second"),
            save_interval="5ba",
        )
    again = {"load_path": str(tmp_path / "second" / "ep0-ba5-rank0.pt")}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="weight_decay")
        found = train(*kind, settings={"weight_decay": 0.3}, **again)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    with pytest.warns(UserWarning, match="weight_decay: .* with 0.3, this run says 0.0001"):
        train(*kind, **again)
