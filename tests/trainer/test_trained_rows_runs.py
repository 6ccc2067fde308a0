"""Runs that train rows only: what they train, keep and tell."""

import copy
import logging
import re
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from both_ways import BATCH_SIZE, BATCHES, BETAS, DECAY, EPS, LR, microbatches
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.models import HuggingFaceModel
from composer.optim import DecoupledAdamW
from composer_run import ExactLoss, StopAt, assert_same_weights, make_trainer, run
from helpers import TokenDataset, cross_entropy, tiny_llama
from rich.console import Console
from row_oracle import RowOracle
from rows_run import DECOUPLED, MODES, STAGES, apex, clipping
from running_rows import operators_now, rows_now
from torch.utils.data import DataLoader

from apex_composer import APEX, StagewiseScheduler
from apex_composer.tools.checkpoint_file import read_checkpoint
from apex_composer.tools.show import make_tables
from apex_composer.trainable.check import embeddings


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
    names = [n for n, p in twin.named_parameters() if any(p is s.weight for s in embeddings(twin))]
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_the_same_bits(mode, dtype, tmp_path):
    """From the middle of a stage and from its boundary; with weights that stay in bfloat16."""
    options = {**DECOUPLED, "microbatch": 2}
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    whole, weights, _ = run(
        apex(mode), clipping(), model=tiny_llama(dtype=dtype), **options, **saved
    )
    assert all(weight.dtype == dtype for weight in weights.values())
    for batch in (3, 4):
        model, load = tiny_llama(seed=1, dtype=dtype), str(tmp_path / f"ep0-ba{batch}-rank0.pt")
        resumed, found, _ = run(clipping(), apex(mode), model=model, load_path=load, **options)
        assert resumed.history == whole.history
        assert_same_weights(found, weights)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a run with trainable: selected, in its second stage."""
    folder = tmp_path_factory.mktemp("saved")
    run(apex(), save_folder=str(folder), save_interval="4ba", save_latest_filename=None)
    return folder / "ep0-ba4-rank0.pt"


def test_a_checkpoint_is_an_ordinary_one(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=False)["state"]
    plain = HuggingFaceModel(tiny_llama(seed=1), tokenizer=None)
    plain.load_state_dict(saved["model"])
    # Nothing but the name of the one parameter that stands for the optimizer's empty state.
    assert len(saved["optimizers"]["AdamW"]["state"]) == 1
    assert saved["algorithms"][0][1]["apex"]["rows"]
    text = Console(width=200, file=StringIO())
    for table in make_tables(read_checkpoint(checkpoint)):
        text.print(table)
    assert re.search("parameters in trained rows.*in torch.float32", text.file.getvalue())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"trainable": "all"}, "trained with 'selected', this run says 'all', and the optimizer"),
        (MODES["half"], "trained with 'selected', this run says 'half', and the optimizer"),
        (MODES["disadvantageous"], "^trainable: the checkpoint was trained with 'selected'"),
        ({"trainable_share": 0.3}, "^trainable_share: the checkpoint was trained with None"),
    ],
)
def test_a_checkpoint_of_other_rows_is_refused(checkpoint, settings, told):
    trainer = None
    with pytest.raises(ValueError, match=told):
        trainer = make_trainer(apex(**settings), load_path=str(checkpoint))
        trainer.fit()
    if trainer is not None:
        trainer.close()


def test_a_checkpoint_of_everything_is_refused(tmp_path):
    folder = {"save_folder": str(tmp_path), "save_interval": "4ba"}
    run(APEX(threshold=0.25, stages=STAGES), **folder)
    trainer = make_trainer(apex(), load_path=str(tmp_path / "ep0-ba4-rank0.pt"))
    with pytest.raises(ValueError, match="^trainable: the checkpoint was trained with 'all'"):
        trainer.fit()
    trainer.close()


def test_a_second_fit_and_one_from_the_start():
    reference, weights, _ = run(apex())
    algorithm = apex()
    trainer = make_trainer(algorithm, callbacks=(StopAt(4),))
    trainer.fit()
    trainer.state.max_duration = "6ba"
    trainer.fit()
    assert algorithm.history == reference.history
    assert_same_weights(trainer.state.model.model.state_dict(), weights)
    with pytest.warns(UserWarning, match="the run begins anew"):
        trainer.fit(duration="6ba", reset_time=True)
    assert [record["start_batch"] for record in algorithm.history] == [0, 3]
    trainer.close()
    assert all(p.requires_grad for p in trainer.state.model.parameters())


class OutOfMemory(Callback):
    """Fails once, behind the backward pass of a batch's first microbatch; or halves it itself."""

    def __init__(self, fails: bool):
        self.fails = fails

    def batch_start(self, state, logger):
        if not self.fails and state.timestamp.batch.value == 4:
            state.device_train_microbatch_size = 2

    def after_backward(self, state, logger):
        if self.fails and state.timestamp.batch.value == 4:
            self.fails = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (test)")


def train_to_the_end(fails: bool, mode: str) -> dict:
    trainer = make_trainer(apex(mode), clipping(), callbacks=(OutOfMemory(fails),), microbatch=4)
    trainer.state.auto_microbatching = True  # Composer accepts `auto` on a GPU only
    trainer.fit()
    trainer.close()
    return trainer.state.model.model.state_dict()


@pytest.mark.parametrize("mode", ["selected", "half"])
def test_a_batch_that_is_tried_again_forgets_its_gradients(mode):
    with pytest.warns(RuntimeWarning, match="microbatch size will be decreased from 4 -> 2"):
        found = train_to_the_end(True, mode)
    assert_same_weights(found, train_to_the_end(False, mode))


def test_epochs_are_stages_and_evaluation_changes_nothing():
    data = DataLoader(TokenDataset(12), batch_size=4)
    epochs = {"loader": data, "max_duration": "2ep"}
    found, weights, log = run(
        apex(stages=["1ep", "1ep"]), eval_dataloader=data, eval_interval="1ba", **epochs
    )
    assert [record["start_batch"] for record in found.history] == [0, 3]
    assert_same_weights(weights, run(apex(stages=["3ba", "3ba"]), **epochs)[1])
    share = found._expander.share
    for name, value in (("parameters", share.trained), ("share", share.trained / share.total)):
        assert [x for _, x in log.data[f"apex/trained_{name}"]] == [value] * 2


def test_the_share_is_met_and_told(caplog):
    caplog.set_level(logging.INFO, logger="apex_composer")
    found, _, log = run(apex(trainable_share=0.3), max_duration="6ba")
    share = found._expander.share
    assert 0.9 * 0.3 * share.total <= share.trained <= 0.3 * share.total
    assert share.describe() in caplog.text
    assert log.hyperparameters["apex/trained"] == share.describe()  # which the console shows, too


@pytest.mark.parametrize("mode", ["selected", "half"])
def test_entries_are_cut_off_where_clipping_is_by_value(mode):
    largest = []

    class Gradients(Callback):
        def after_train_batch(self, state, logger):
            training = algorithm._expander.training
            leaves = [*(part.copy for part in training.parts()), *state.model.parameters()]
            gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
            largest.append(max(float(gradient.abs().max()) for gradient in gradients))

    algorithm = apex(mode)
    run(algorithm, GradientClipping("value", 1e-3), callbacks=(Gradients(),))
    assert largest == [pytest.approx(1e-3)] * 6
