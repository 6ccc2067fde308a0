"""A run of Composer is training of W and T by autograd through W_eff."""

import copy

import pytest
import torch
from both_ways import (
    BATCH_SIZE,
    BATCHES,
    BETAS,
    DECAY,
    LR,
    MICROBATCHES,
    check_weights,
    eps_of,
    make_adamw,
    train_by_autograd,
)
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.optim import DecoupledAdamW
from composer_run import ExactLoss
from helpers import TokenDataset, factors_now, tiny_llama
from llmfoundry.optim import DecoupledLionW
from torch.utils.data import DataLoader

from apex_composer import APEX, StagewiseScheduler


class Recorder(Callback):
    """What the oracle needs to know of a run: losses, learning rates, each stage's start."""

    def __init__(self, apex: APEX):
        self.apex = apex
        self.losses, self.lrs, self.stages = [], [], {}

    def batch_start(self, state, logger):
        batch = state.timestamp.batch.value
        self.lrs.append(state.optimizers[0].param_groups[0]["lr"])
        if self.apex.history[-1]["start_batch"] == batch:
            self.stages[batch] = factors_now(self.apex._expander, prefix="model.")

    def before_train_batch(self, state, logger):
        self.losses.append(0.0)

    def after_loss(self, state, logger):
        self.losses[-1] += state.loss.item() / MICROBATCHES  # Composer's own sum is in float32


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The user's optimizer; decoupled ones take a decay that is not multiplied by lr."""
    if name == "AdamW":
        return make_adamw(model)
    options = {"betas": BETAS, "weight_decay": DECAY * LR}
    if name == "DecoupledAdamW":
        return DecoupledAdamW(model.parameters(), LR, eps=eps_of(model), **options)
    return DecoupledLionW(model.parameters(), LR, **options)


def train_with_composer(model, optimizer_name: str, algorithms: list, dataset) -> Recorder:
    """Two stages of four batches, two microbatches each, through the Trainer."""
    apex = next(a for a in algorithms if isinstance(a, APEX))
    recorder = Recorder(apex)
    wrapped = ExactLoss(model, tokenizer=None, use_logits=True)
    trainer = Trainer(
        model=wrapped,
        train_dataloader=DataLoader(dataset, batch_size=BATCH_SIZE),
        optimizers=make_optimizer(optimizer_name, wrapped),
        schedulers=StagewiseScheduler(stages=2, lr_multipliers=[1.0, 0.4]),
        max_duration=f"{BATCHES}ba",
        algorithms=algorithms,
        callbacks=[recorder],
        device_train_microbatch_size=BATCH_SIZE // MICROBATCHES,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return recorder


def compare(model, optimizer_name, clip, clip_first, tolerance):
    """Train a model both ways and compare losses and all weights."""
    dataset, twin = TokenDataset(BATCHES * BATCH_SIZE), copy.deepcopy(model)
    # 1.0 is what it is anyway; given, it is not warned about with Lion.
    algorithms = [APEX(stages=2, threshold=0.25, kv_heads="expand", operator_lr_scale=1.0)]
    if clip is not None:
        clipping = GradientClipping("norm", clip)
        algorithms = [clipping, *algorithms] if clip_first else [*algorithms, clipping]
    start = copy.deepcopy(model.state_dict())
    run = train_with_composer(model, optimizer_name, algorithms, dataset)
    assert sorted(run.stages) == [0, 4]
    assert run.lrs[0] == LR and run.lrs[-1] == pytest.approx(0.4 * LR)
    optimizer = make_optimizer(optimizer_name, twin)
    losses = train_by_autograd(twin, optimizer, clip, run.stages, run.lrs)
    assert run.losses == pytest.approx(losses, rel=tolerance, abs=0)
    check_weights(model.state_dict(), twin.state_dict(), start, tolerance)


@pytest.mark.parametrize(
    ("optimizer", "clip_first"),
    [
        ("AdamW", None),
        ("AdamW", False),
        ("DecoupledAdamW", True),
        ("DecoupledLionW", None),
        ("DecoupledLionW", True),
    ],
)
def test_composer_run_equals_autograd_in_float64(optimizer, clip_first):
    clip = None if clip_first is None else 0.05
    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    compare(model, optimizer, clip, clip_first, tolerance=1e-10)


@pytest.mark.numeric
def test_composer_run_equals_autograd_in_float32():
    compare(tiny_llama(kv_heads=2), "AdamW", None, None, tolerance=1e-5)
