"""Runs that train rows only: what they train, refuse, keep and leave behind."""

import copy
import logging
from functools import partial

import pytest
import torch
from both_ways import BATCH_SIZE, BATCHES, BETAS, DECAY, EPS, LR, microbatches
from composer import Callback, Trainer
from composer.algorithms import EMA, GradientClipping
from composer.core import Event
from composer.models import HuggingFaceModel
from composer.optim import DecoupledAdamW
from composer.utils import FSDP2Config, FSDPConfig
from composer_run import ExactLoss, StopAt, assert_same_weights, make_trainer, run
from helpers import TokenDataset, cross_entropy, tiny_llama
from row_oracle import RowOracle
from running_rows import operators_now, rows_now
from torch.utils.data import DataLoader

from apex_composer import APEX, StagewiseScheduler
from apex_composer.tools.checkpoint_file import read_checkpoint
from apex_composer.tools.show import make_tables
from apex_composer.trainable.check import embeddings
from apex_composer.trainer.trained_rows import check_rows

MODES = {
    "selected": {"trainable": "selected"},
    "half": {"trainable": "half", "trainable_share": 0.84},
    "disadvantageous": {"trainable": "disadvantageous"},
}
STAGES = ["3ba", "3ba"]
DECOUPLED = {
    "optimizer": DecoupledAdamW,
    "settings": {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": 1e-3},
}


def apex(mode: str = "selected", **settings) -> APEX:
    return APEX(**{"threshold": 0.25, "stages": STAGES, **MODES[mode], **settings})


class Watch(Callback):
    """What the oracle needs to know of a run: rates, losses, and what each stage trains."""

    def __init__(self, algorithm: APEX):
        self.apex, self.stages, self.lrs, self.losses = algorithm, {}, [], []

    def batch_start(self, state, logger):
        batch, expander = state.timestamp.batch.value, self.apex._expander
        self.lrs.append(state.optimizers[0].param_groups[0]["lr"])
        if self.apex.history[-1]["start_batch"] == batch:
            self.stages[batch] = rows_now(expander, "model."), operators_now(expander, "model.")

    def before_train_batch(self, state, logger):
        self.losses.append(0.0)

    def after_loss(self, state, logger):
        self.losses[-1] += state.loss.item() / 2


def train_with_composer(model, algorithm: APEX, clip: float, first: bool) -> Watch:
    """Two stages of four batches of two microbatches."""
    watch, clipping = Watch(algorithm), GradientClipping("norm", clip)
    wrapped = ExactLoss(model, tokenizer=None, use_logits=True)
    trainer = Trainer(
        model=wrapped,
        train_dataloader=DataLoader(TokenDataset(BATCHES * BATCH_SIZE), batch_size=BATCH_SIZE),
        optimizers=DecoupledAdamW(
            wrapped.parameters(), LR, betas=BETAS, eps=EPS, weight_decay=DECAY * LR
        ),
        schedulers=StagewiseScheduler(stages=2, lr_multipliers=[1.0, 0.4]),
        max_duration=f"{BATCHES}ba",
        algorithms=[clipping, algorithm] if first else [algorithm, clipping],
        callbacks=[watch],
        device_train_microbatch_size=BATCH_SIZE // 2,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return watch


def mean_loss(batch: int, call) -> torch.Tensor:
    """Of the microbatches of a batch."""
    parts = microbatches(batch)
    return sum(cross_entropy(call(input_ids=part).logits, part) for part in parts) / len(parts)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_equals_autograd_in_float64(mode, first):
    """With clipping before or behind apex, and Composer's decoupled decay."""
    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    twin, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    share = {"trainable_share": 0.9} if mode == "half" else {}
    algorithm = apex(mode, stages=2, kv_heads="expand", **share)
    watch = train_with_composer(model, algorithm, 0.05, first)
    assert sorted(watch.stages) == [0, 4] and watch.lrs[-1] == pytest.approx(0.4 * LR)
    names = [n for n, p in twin.named_parameters() if any(p is w for w in embeddings(twin))]
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    oracle = RowOracle(twin, names if mode == "half" else [], options)
    losses = []
    for batch in range(BATCHES):
        if batch in watch.stages:
            oracle.begin_stage(*watch.stages[batch])
        losses.append(oracle.step(partial(mean_loss, batch), watch.lrs[batch], clip=0.05))
    oracle.write()
    assert watch.losses == pytest.approx(losses, rel=1e-10)
    for name, weight in model.state_dict().items():
        difference = (weight - twin.state_dict()[name]).abs().max()
        assert difference <= 1e-10 * weight.abs().max(), name
    moved = [
        float((model.state_dict()[name] - weight).abs().max()) for name, weight in start.items()
    ]
    assert max(moved) > 1e-3
