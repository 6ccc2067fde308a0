"""Resumed runs of several optimizers and schedulers are what their settings say."""

import warnings
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.optim import CosineAnnealingWithWarmupScheduler, DecoupledAdamW
from composer_run import assert_same_weights, make_trainer
from helpers import tiny_llama
from llmfoundry.optim import DecoupledLionW

from apex_composer import APEX, StagewiseScheduler

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
        *([APEX(stages=2, operator_lr_scale=1.0)] if apex else []),
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
    assert_same_weights(expected, found)
    assert_same_weights(unchanged, same)
    assert any(not torch.equal(expected[name], unchanged[name]) for name in expected)


def split_by_size(parameters, **settings) -> torch.optim.Optimizer:
    """Matrices and norms in groups of their own."""
    matrices, norms = [], []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else norms).append(parameter)
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "lr": 3e-3, "weight_decay": 0.0}], **settings
    )


def split_the_other_way(parameters, **settings) -> torch.optim.Optimizer:
    groups = split_by_size(parameters, **settings).param_groups
    return torch.optim.AdamW(groups[::-1], **settings)


@pytest.mark.parametrize("scheduler", ["none", "stagewise"])
def test_param_groups_in_another_order_are_refused_when_the_trainer_is_built(scheduler, tmp_path):
    options = {"settings": {"lr": 1e-2}, "schedulers": SCHEDULERS[scheduler]()}
    trainer = make_trainer(APEX(stages=2), optimizer=split_by_size, **options)
    trainer.fit(duration="4ba")
    trainer.save_checkpoint(str(tmp_path / "last.pt"))
    trainer.close()
    load = {"load_path": str(tmp_path / "last.pt"), **options}
    with pytest.raises(ValueError, match=r"^optimizer: param group 0 has .model\..*same order"):
        make_trainer(APEX(stages=2), optimizer=split_the_other_way, **load)
    make_trainer(APEX(stages=2), optimizer=split_by_size, **load).close()


def test_another_rate_counts_at_once_without_stagewise(tmp_path):
    """The decoupled weight decay too, which goes with lr over its base."""
    kind = "composer", "none"
    expected = train(*kind, SetAt(4, lr=5e-3, initial_lr=5e-3))
    path = checkpoint(tmp_path, *kind)
    with pytest.warns(UserWarning, match="lr: .* 0.01, this run says 0.005"):
        found = train(*kind, settings={"lr": 5e-3}, load_path=path)
    assert_same_weights(expected, found)


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
    assert_same_weights(expected, found)
    with pytest.warns(UserWarning, match="weight_decay: .* with 0.3, this run says 0.0001"):
        train(*kind, **again)
