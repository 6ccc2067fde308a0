"""Instruction tuning's YAML with LoRA and ReLoRA in it, on a tiny model: it starts and goes on."""

from pathlib import Path

import pytest
import test_instruct_yamls
import torch
from composer_run import assert_same_weights
from omegaconf import OmegaConf
from test_instruct_yamls import (  # noqa: F401
    YAMLS,
    inputs,
    left_as_found,
    rewound,
    train,
    train_sharded,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

NAME = "llama2_7b_full"
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
RELORA = {"interval": "1ba", "t_warmup": "0ba"}


def write_yaml(folder: Path, *, relora: bool) -> None:
    """The YAML of full fine-tuning, with adapters instead."""
    config = OmegaConf.load(YAMLS / f"{NAME}.yaml")
    config.model.peft_config = {**LORA, "lora_alpha": 8}
    config.model.should_save_peft_only = not relora
    if not relora:  # the checkpoints of shards could not be loaded: `start_guard` refuses them
        config.fsdp_config.state_dict_type = "full"
    else:
        config.algorithms.relora = RELORA
        del config.callbacks.hf_checkpointer
    OmegaConf.save(config, folder / f"{NAME}.yaml")


def saved_weights(run: Path, batch: int, folder: Path) -> dict[str, torch.Tensor]:
    """The model in a run's checkpoint, of one file or of shards."""
    path = run / "checkpoints" / f"ep0-ba{batch}"
    if path.is_dir():
        folder.mkdir(exist_ok=True)
        dcp_to_torch_save(path, folder / f"{run.parent.name}-{batch}.pt")
        path = folder / f"{run.parent.name}-{batch}.pt"
    else:
        path = path.with_name(f"{path.name}-rank0.pt")
    return torch.load(path, weights_only=False)["state"]["model"]


@pytest.mark.parametrize(
    ("training", "relora"),
    [
        (train, True),
        *(pytest.param(train_sharded, relora, marks=pytest.mark.long) for relora in (True, False)),
    ],
)
def test_the_same_command_goes_on(training, relora, inputs, tmp_path, monkeypatch):  # noqa: F811
    write_yaml(tmp_path, relora=relora)
    monkeypatch.setattr(test_instruct_yamls, "YAMLS", tmp_path)
    first = training(NAME, "full", inputs, tmp_path / "first", save_interval="1ba")
    (first / "huggingface").mkdir(exist_ok=True)
    (tmp_path / "second").mkdir()
    rewound(first, tmp_path / "second")
    second = training(NAME, "full", inputs, tmp_path / "second", save_interval="1ba")
    before, last, resumed = (
        saved_weights(run, batch, tmp_path / "whole")
        for run, batch in ((first, 1), (first, 2), (second, 2))
    )
    assert_same_weights(resumed, last)
    changed = {name for name, weight in last.items() if not torch.equal(weight, before[name])}
    kinds = {name.split(".")[-3 if "lora_" in name else -2] for name in changed}
    # After a restart every B is 0.
    assert kinds == ({"lora_A", "base_layer"} if relora else {"lora_A", "lora_B"})
    assert all("lora_" in name for name in last) != relora
