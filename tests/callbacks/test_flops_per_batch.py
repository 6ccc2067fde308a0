"""A run's speed_monitor logs FLOPs per second: of what is really trained, or none."""

import copy
import logging
import pickle
from unittest.mock import Mock

import pytest
import torch
from composer import Callback, Trainer
from composer.callbacks import SpeedMonitor
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer_run import BATCH_SIZE, make_trainer
from helpers import TokenDataset, tiny_llama
from lora_runs import lora_llama, make_lora_trainer
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from apex_composer import APEX
from apex_composer.callbacks.flops_per_batch import give, read_plain, take_back
from apex_composer.callbacks.start_guard import StartGuard
from apex_composer.methods.hft import HFT
from apex_composer.model.flops import Flops, training_flops
from apex_composer.model.trained_parts import find_roles

LENGTH = 8
BATCH = {"input_ids": torch.zeros(2, LENGTH, dtype=torch.long)}
FLOPS = "throughput/device/flops_per_sec"


class Counted(Callback):
    """What torch counts of the second batch, without rotary embeddings, and what is told of it."""

    def __init__(self):
        self.counter, self.found, self.told = None, None, None

    def before_forward(self, state, logger):
        if state.timestamp.batch == 1 and self.counter is None:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def after_backward(self, state, logger):
        if self.counter is not None and self.found is None:
            self.counter.__exit__(None, None, None)
            by_module = self.counter.get_flop_counts()
            angles = [n for n in by_module if n.split(".")[-1].startswith("rotary_emb")]
            less = sum(sum(by_module[name].values()) for name in angles)
            self.found = self.counter.get_total_flops() - less

    def batch_end(self, state, logger):
        if state.timestamp.batch == 2:
            self.told = state.model.flops_per_batch(state.batch)


def watched(*callbacks, **options):
    callbacks = [StartGuard(), SpeedMonitor(), *callbacks]
    return make_trainer(callbacks=callbacks, **{"max_duration": "2ba"} | options)


def eager(model):
    model.config._attn_implementation = "eager"
    return model


def trainer_of(kind: str, **options):
    if kind == "lora":
        return make_lora_trainer(model=eager(lora_llama(torch.float32)), **options)
    if kind == "frozen first layer":
        model = eager(tiny_llama())
        for part in (model.model.embed_tokens, model.model.layers[0]):
            part.requires_grad_(False)
        return make_trainer(model=model, **options)
    algorithms = {
        "all": [],
        "apex": [APEX(stages=1, threshold=0.25)],
        "selected": [APEX(stages=1, threshold=0.25, trainable="selected")],
        "half": [APEX(stages=1, threshold=0.25, trainable="half", trainable_share=0.84)],
        "disadvantageous": [APEX(stages=1, threshold=0.25, trainable="disadvantageous")],
        "hft": [HFT(seed=0)],
    }
    return make_trainer(*algorithms[kind], model=eager(tiny_llama()), **options)


KINDS = ["all", "apex", "selected", "half", "disadvantageous", "hft", "lora", "frozen first layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_is_what_is_computed(kind):
    counted = Counted()
    trainer = trainer_of(
        kind, callbacks=[StartGuard(), SpeedMonitor(), counted], max_duration="2ba"
    )
    trainer.fit()
    whole = BATCH_SIZE * training_flops(eager(tiny_llama()).config).of_sequence(LENGTH)
    assert counted.told == counted.found
    # Rows of every weight are trained by way of the whole weight's gradient.
    assert (counted.found == whole) == (kind in ("all", "apex", "half"))
    assert not hasattr(trainer.state.model, "flops_per_batch")
    trainer.close()


class Failing(Callback):
    def batch_end(self, state, logger):
        raise KeyboardInterrupt


def test_a_run_that_failed_leaves_nothing_behind_when_it_is_closed():
    trainer = watched(Failing())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert hasattr(trainer.state.model, "flops_per_batch")
    trainer.close()
    assert not hasattr(trainer.state.model, "flops_per_batch")


class Told(Callback):
    def __init__(self):
        self.flops = []

    def batch_end(self, state, logger):
        self.flops.append(state.model.flops_per_batch(state.batch))


def logged(*callbacks, **options) -> InMemoryLogger:
    log = InMemoryLogger()
    monitor = SpeedMonitor(window_size=1, gpu_flops_available=10**9)
    options = {
        "callbacks": [*callbacks, monitor],
        "loggers": [log],
        "max_duration": "3ba",
    } | options
    trainer = make_trainer(**options)
    trainer.fit()
    trainer.close()
    return log


def test_the_speed_monitor_logs_flops_per_second_and_their_share_of_a_peak():
    data = logged(StartGuard(), microbatch=2).data
    assert len(data[FLOPS]) == 2
    speed = data["throughput/device/batches_per_sec"]
    batch = BATCH_SIZE * training_flops(tiny_llama().config).of_sequence(LENGTH)
    for (_, flops), (_, batches), (_, mfu) in zip(
        data[FLOPS], speed, data["throughput/device/mfu"], strict=True
    ):
        assert flops == pytest.approx(batch * batches)
        assert mfu == pytest.approx(flops / 1e9)
    assert FLOPS not in logged().data  # without start_guard


def test_who_did_not_ask_for_it_hears_nothing(caplog):
    model = tiny_llama()
    model.config.model_type = "lama"
    trainer = make_trainer(model=model, callbacks=[StartGuard()], max_duration="1ba")
    with caplog.at_level(logging.INFO):
        trainer.fit()
    told = [r.getMessage() for r in caplog.records if "FLOPs" in r.getMessage()]
    assert told == [] and not hasattr(trainer.state.model, "flops_per_batch")


class Tuples(HuggingFaceModel):
    """Takes batches that are no mappings, as a user's own model may."""

    def forward(self, batch):
        return self.model(input_ids=batch[0], labels=batch[0])

    def loss(self, outputs, batch):
        return outputs.loss


def test_batches_that_cannot_be_counted_do_not_end_a_run(caplog):
    log = InMemoryLogger()
    trainer = Trainer(
        model=Tuples(tiny_llama(), tokenizer=None),
        train_dataloader=DataLoader(TensorDataset(BATCH["input_ids"]), batch_size=1),
        optimizers=torch.optim.SGD(tiny_llama().parameters(), 0.1),
        max_duration="2ba",
        callbacks=[StartGuard(), SpeedMonitor(window_size=1)],
        loggers=[log],
        device="cpu",
        progress_bar=False,
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    trainer.close()
    assert trainer.state.timestamp.batch == 2 and FLOPS not in log.data
    assert "its batches have no input_ids of sequences and tokens" in caplog.text


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, LENGTH), None])
def test_ids_of_another_shape_have_no_number(ids, caplog):
    model = HuggingFaceModel(tiny_llama(), tokenizer=None)
    roles = read_plain(model)
    give(model, roles, BATCH)
    give(model, roles, {"input_ids": ids})
    assert not hasattr(model, "flops_per_batch") and "no input_ids of sequences" in caplog.text


def test_a_model_that_cannot_be_read_is_no_reason_not_to_train(caplog, monkeypatch):
    model = HuggingFaceModel(tiny_llama(), tokenizer=None)
    model.scale = torch.nn.Parameter(torch.ones(()))  # outside of all modules
    assert read_plain(model) is None and "scale [] is no matrix" in caplog.text
    del model.scale
    error = NotImplementedError("no embeddings")
    monkeypatch.setattr(model.model, "get_output_embeddings", Mock(side_effect=error))
    assert read_plain(model) is None and "NotImplementedError: no embeddings" in caplog.text


class Freezing(Told):
    """Freezes at an epoch's end, as Composer's layer_freezing does."""

    def epoch_end(self, state, logger):
        for part in (state.model.model.model.embed_tokens, state.model.model.model.layers[0]):
            part.requires_grad_(False)


def test_what_is_frozen_later_is_counted_again():
    told = Freezing()
    loader = DataLoader(TokenDataset(BATCH_SIZE), batch_size=BATCH_SIZE)
    watched(told, loader=loader, max_duration="2ep").fit()
    model = tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    frozen = {name for name in names if "embed_tokens" in name or "layers.0." in name}
    flops = find_roles(model).flops(names - frozen)
    assert told.flops == [
        BATCH_SIZE * count.of_sequence(LENGTH) for count in (training_flops(model.config), flops)
    ]


class Lengths(torch.utils.data.Dataset):
    """Batches of a finetuning loader: each as long as its longest sample."""

    def __len__(self):
        return 2 * BATCH_SIZE

    def __getitem__(self, index):
        return TokenDataset(1, length=4 + 4 * (index // BATCH_SIZE), padded=True)[0]


def test_batches_of_other_lengths_count_by_their_own():
    told, loader = Told(), DataLoader(Lengths(), batch_size=BATCH_SIZE)
    watched(told, loader=loader).fit()
    flops = training_flops(tiny_llama().config)
    assert told.flops == [BATCH_SIZE * flops.of_sequence(length) for length in (4, 8)]


def test_a_users_own_count_is_left_alone(monkeypatch):
    monkeypatch.setattr(HuggingFaceModel, "flops_per_batch", lambda self, batch: 7, raising=False)
    told = Told()
    trainer = watched(told)
    trainer.fit()
    trainer.close()
    assert told.flops == [7, 7] and trainer.state.model.flops_per_batch({}) == 7


def test_an_unknown_architecture_is_told_and_has_no_number(caplog):
    model = tiny_llama()
    model.config.model_type = "lama"
    with caplog.at_level(logging.WARNING):
        data = logged(StartGuard(), model=model).data
    assert FLOPS not in data
    (told,) = [r.getMessage() for r in caplog.records if "start_guard" in r.getMessage()]
    assert "neither flops_per_sec nor MFU" in told and "model_type 'lama'" in told


def test_the_attribute_is_in_nobodys_way(tmp_path):
    """Copies, pickles, weights and checkpoints are as without it."""
    model = HuggingFaceModel(tiny_llama(), tokenizer=None, use_logits=True)
    names = list(model.state_dict())
    give(model, read_plain(model), BATCH)
    assert isinstance(model.flops_per_batch, Flops) and list(model.state_dict()) == names
    assert pickle.loads(pickle.dumps(copy.deepcopy(model))).flops_per_batch == model.flops_per_batch
    model.model.save_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=True)
    assert "flops" not in (tmp_path / "hf" / "config.json").read_text()
    take_back(model)
    assert "flops_per_batch" not in vars(model)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    first, second = Told(), Told()
    trainer = watched(first, save_folder=str(tmp_path), save_interval="1ba")
    trainer.fit()
    trainer.fit(duration="1ba")
    trainer.close()
    path = str(next(tmp_path.glob("*-ba1-rank0.pt")))
    watched(second, load_path=path).fit()
    assert len(first.flops) == 3 and set(first.flops) == set(second.flops)


def test_weights_that_are_not_shown_one_by_one_have_no_number(caplog):
    model = HuggingFaceModel(tiny_llama(), tokenizer=None, use_logits=True)
    roles = read_plain(model)
    flat = HuggingFaceModel(tiny_llama(), tokenizer=None)
    flat.model = torch.nn.Module()
    flat._flat_param = torch.nn.Parameter(torch.zeros(3))
    give(flat, roles, BATCH)
    assert not hasattr(flat, "flops_per_batch") and "shows no parameter model.model" in caplog.text
