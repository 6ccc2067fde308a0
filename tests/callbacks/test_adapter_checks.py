"""Adapters whose checkpoint or export would lose something are refused, others pass."""

import pytest
import torch
from composer.models import HuggingFaceModel
from helpers import tiny_qwen
from peft import LoraConfig, get_peft_model

from apex_composer.callbacks.adapter_checks import check_adapters
from apex_composer.callbacks.start_guard import StartGuard

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
# What checkpoints of the adapters alone hold in full; and what they do not.
SAVED = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"bias": "all"},
]
LOST = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [1, 2]},
    {"bias": "lora_only"},
]
CHANGED = [settings for settings in LOST if "init_lora_weights" in settings]


def run_with(settings: dict, whole: bool | None = None, **config) -> dict:
    """A run's configuration with LoRA and these settings of it."""
    model = {"name": "hf_causal_lm", "peft_config": LORA | settings}
    if whole is not None:
        model["should_save_peft_only"] = not whole
    return {"model": model, **config}


def unsaved(settings: dict) -> set[str]:
    """Weights that are trained, or not those that were loaded, and that no checkpoint holds."""
    torch.manual_seed(0)  # for biases that are not zero
    qwen = tiny_qwen()
    loaded = {name: weight.clone() for name, weight in qwen.state_dict().items()}
    config = LoraConfig(**LORA | settings)
    config.peft_type = "LORA"  # as Composer hands it on
    model = HuggingFaceModel(get_peft_model(qwen, config), tokenizer=None, use_logits=True)
    saved = model.state_dict()

    def changed(name: str, weight: torch.Tensor) -> bool:
        name = name.removeprefix("model.base_model.model.")
        for wrapper in ("base_layer.", "original_module.", "token_adapter."):
            name = name.replace(wrapper, "")
        return not torch.equal(weight, loaded[name])

    return {
        name
        for name, weight in model.named_parameters()
        if name not in saved and (weight.requires_grad or changed(name, weight))
    }


@pytest.mark.parametrize("settings", SAVED, ids=str)
def test_what_adapter_checkpoints_hold_passes(settings):
    assert not unsaved(settings)
    check_adapters(run_with(settings, callbacks={"hf_checkpointer": {}}))


@pytest.mark.parametrize("settings", LOST, ids=str)
def test_what_adapter_checkpoints_lose_is_refused_before_data_are_read(settings):
    assert unsaved(settings)
    for config in (run_with(settings), run_with(settings, whole=False)):
        with pytest.raises(ValueError, match="should_save_peft_only: got true") as error:
            StartGuard(train_config=config)
        assert f"model.peft_config.{next(iter(settings))}" in str(error.value)
        assert "Set model.should_save_peft_only: false" in str(error.value)
    StartGuard(train_config=run_with(settings, whole=True))


@pytest.mark.parametrize("settings", [*CHANGED, {"relora": {}}], ids=str)
def test_an_adapter_is_not_exported_without_the_base_that_it_changed(settings):
    algorithms = {"relora": {}} if "relora" in settings else None
    peft = {} if algorithms else settings
    config = run_with(peft, whole=True, algorithms=algorithms, callbacks={"hf_checkpointer": {}})
    with pytest.raises(ValueError, match="hf_checkpointer.*apex-composer merge"):
        check_adapters(config)
    if algorithms:
        with pytest.raises(ValueError, match="got true with algorithms: relora"):
            check_adapters(run_with({}, algorithms=algorithms))


@pytest.mark.parametrize("settings", [s for s in LOST if s not in CHANGED], ids=str)
def test_what_is_trained_beside_adapters_is_exported_with_them(settings):
    check_adapters(run_with(settings, whole=True, callbacks={"hf_checkpointer": {}}))


def test_an_initialisation_that_needs_data_is_refused():
    with pytest.raises(ValueError, match="init_lora_weights: got eva"):
        check_adapters(run_with({"init_lora_weights": "eva"}, whole=True))


def test_checkpoints_that_could_not_be_loaded_are_refused():
    shards = {"fsdp_config": {"state_dict_type": "sharded"}}
    with pytest.raises(ValueError, match="state_dict_type: got sharded with .*: true"):
        check_adapters(run_with({}, **shards))
    check_adapters(run_with({}, whole=True, **shards))
    check_adapters(run_with({}, fsdp_config={"state_dict_type": "full"}))


def test_adapters_are_not_trained_in_bf16():
    config = run_with({})
    config["model"]["master_weights_dtype"] = "bf16"
    with pytest.raises(ValueError, match="master_weights_dtype: got bf16 with peft_config"):
        check_adapters(config)


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": {"peft_config": None}}], ids=str)
def test_runs_without_adapters_pass(config):
    check_adapters({**config, "callbacks": {"hf_checkpointer": {}}})
