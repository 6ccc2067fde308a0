"""The callback in a run: what it finds, it finds before the first optimizer step."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from composer import Callback
from composer_run import make_trainer
from helpers import VOCABULARY, tiny_llama
from lora_runs import lora_llama, make_lora_trainer

from apex_composer import APEX
from apex_composer.callbacks.start_guard import StartGuard
from apex_composer.methods.hft import HFT, untrained
from apex_composer.model.find_sites import find_sites

CONFIG = {
    "model": {"pretrained": True},
    "max_seq_len": 8,
    "max_duration": "2ba",
    "global_train_batch_size": 4,
    "device_train_microbatch_size": 2,
    "optimizer": {"name": "decoupled_adamw"},
}


def train(guard: StartGuard, *callbacks: Callback, **options):
    trainer = make_trainer(callbacks=(guard, *callbacks), max_duration="2ba", **options)
    try:
        trainer.fit()
    finally:
        trainer.close()


class Steps(Callback):
    def __init__(self):
        self.losses, self.done = [], 0

    def after_loss(self, state, logger):
        self.losses.append(float(state.loss))

    def batch_end(self, state, logger):
        self.done += 1


def test_weights_that_were_not_loaded_are_found_before_the_first_step():
    model, steps = tiny_llama(), Steps()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"first loss is 4\.\d+.*ln of {VOCABULARY} tokens"):
        train(StartGuard(train_config=CONFIG), steps, model=model)
    assert steps.done == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    ("config", "margin"),
    [
        (CONFIG | {"model": {"pretrained": False}}, 1.0),
        (CONFIG | {"model": {}}, 1.0),
        (CONFIG, None),
        ({}, 1.0),
    ],
)
def test_the_loss_is_checked_only_where_the_model_is_pretrained(config, margin):
    steps = Steps()
    train(StartGuard(train_config=config, margin=margin), steps)
    assert steps.done == 2 and steps.losses[0] > 4.1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"max_seq_len": 65}, "max_seq_len: got 65, .*max_position_embeddings is 64"),
        ({"device_train_microbatch_size": 3}, "device_train_microbatch_size: got 3"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(changed, told):
    with pytest.raises(ValueError, match=told):
        make_trainer(callbacks=(StartGuard(train_config=CONFIG | changed),))


def test_a_tokenizer_of_another_model_is_refused():
    model = SimpleNamespace(tokenizer=range(VOCABULARY + 1), model=tiny_llama())
    with pytest.raises(ValueError, match=f"the model knows {VOCABULARY}"):
        StartGuard().init(SimpleNamespace(model=model, callbacks=[]), None)


def test_the_disk_is_checked_when_the_trainer_is_built(tmp_path, monkeypatch):
    def make(**config):
        guard = StartGuard(train_config=CONFIG | config)
        options = {"save_folder": str(tmp_path), "save_interval": "1ba"}
        make_trainer(callbacks=(guard,), max_duration="2ba", **options).close()

    make(save_interval="1ba")
    size = sum(p.numel() for p in tiny_llama().parameters()) * 12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    make()  # llm-foundry's default interval is longer than this run
    with pytest.raises(ValueError, match="save_folder: 2 checkpoints of"):
        make(save_interval="1ba")


def test_checkpoints_of_a_run_that_trains_rows_need_less(tmp_path, monkeypatch):
    parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    options = {"save_folder": str(tmp_path), "save_interval": "1ba", "max_duration": "2ba"}
    free = 2 * 12 * parameters
    for _ in range(2):
        apex = APEX(stages=1, threshold=0.25, trainable="selected")
        guard = StartGuard(train_config=CONFIG | {"save_interval": "1ba"})
        make_trainer(apex, callbacks=(guard,), **options).close()
        free = 2 * (4 * parameters + 12 * apex.share.trained)
    free -= 1
    with pytest.raises(ValueError, match="save_folder: 2 checkpoints of"):
        make_trainer(apex, callbacks=(guard,), **options)


def test_frozen_weights_have_no_moments(tmp_path, monkeypatch):
    def make(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        guard = StartGuard(train_config=CONFIG | {"save_interval": "1ba"})
        options = {"save_folder": str(tmp_path), "save_interval": "1ba", "max_duration": "2ba"}
        make_trainer(HFT(seed=0), model=tiny_llama(), callbacks=(guard,), **options).close()

    frozen = tiny_llama()
    for module in untrained(find_sites(frozen), 0.5, seed=0):
        module.requires_grad_(False)
    trained = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    size = 4 * sum(p.numel() for p in frozen.parameters()) + 8 * trained
    make(2 * size)
    with pytest.raises(ValueError, match="save_folder: 2 checkpoints of"):
        make(2 * size - 1)


@pytest.mark.parametrize("whole", [True, False])
def test_checkpoints_of_adapters_have_moments_of_adapters_only(whole, tmp_path, monkeypatch):
    def make(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        guard = StartGuard(train_config=CONFIG | {"save_interval": "1ba"})
        options = {"save_folder": str(tmp_path), "save_interval": "1ba", "max_duration": "2ba"}
        model = lora_llama(torch.float32)
        make_lora_trainer(model=model, whole=whole, callbacks=[guard], **options).close()

    adapters, everything = lora_llama().get_nb_trainable_parameters()
    size = 4 * (everything if whole else adapters) + 8 * adapters
    make(2 * size)
    with pytest.raises(ValueError, match="save_folder: 2 checkpoints of"):
        make(2 * size - 1)


def test_unknown_and_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="Did you mean 'margin'"):
        StartGuard(margins=1)
    for wrong in ("1", True, float("nan"), float("inf"), -float("inf"), -1.0):
        told = "start_guard: margin: got .*, allowed: a number of 0 or more, or null"
        with pytest.raises(ValueError, match=told):
            StartGuard(margin=wrong)
