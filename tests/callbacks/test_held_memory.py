from types import SimpleNamespace

import pytest
import torch
from composer.algorithms import EMA
from composer_run import run
from torch import nn

from apex_composer import APEX
from apex_composer.callbacks.held_memory import HeldMemory, held_bytes, tensors_in


def logged_bytes(*algorithms, interval=100):
    """The metrics of a run of three batches, and the bytes of its model."""
    _, weights, log = run(*algorithms, callbacks=(HeldMemory(interval),), max_duration="3ba")
    return log.data, sum(weight.nbytes for weight in weights.values())


def test_adamw_holds_two_moments_and_full_tuning_nothing_else():
    logged, size = logged_bytes()
    [(timestamp, held)] = logged["held/optimizer_bytes"]
    assert timestamp.batch.value == 1
    steps = held - 2 * size
    assert 0 <= steps < 0.01 * size
    assert [value for _, value in logged["held/method_bytes"]] == [0]


def test_an_average_of_the_weights_is_the_methods():
    logged, size = logged_bytes(EMA(half_life="2ba", update_interval="1ba"), interval=1)
    held = [value for _, value in logged["held/method_bytes"]]
    assert all(size <= value < 1.01 * size for value in held)  # and the rotary buffer


def test_what_apex_holds_is_counted():
    """The operators with their moments, and the copies of base weights."""
    logged, size = logged_bytes(APEX(stages=1))
    [(_, held)] = logged["held/method_bytes"]
    assert 0.05 * size < held < size


def test_what_peft_adds_is_the_methods_and_shared_memory_counts_once():
    model = nn.Module()
    model.base, model.lora_A = nn.Linear(4, 4), nn.Module()
    model.lora_A.default = nn.Linear(4, 2, bias=False)
    added = model.lora_A.default.weight
    optimizer = torch.optim.SGD([added])
    optimizer.state[added] = {"moment": (whole := torch.zeros(8)), "view": whole[:2]}
    outer = nn.ModuleList([model])
    held = held_bytes(SimpleNamespace(model=outer, optimizers=(optimizer,), algorithms=[]))
    assert held == {"held/optimizer_bytes": 32, "held/method_bytes": 32}


def test_models_and_circles_are_not_followed():
    thing = SimpleNamespace(model=nn.Linear(2, 2), own=[torch.ones(1)], rows={"a": torch.ones(2)})
    thing.itself = thing
    assert sorted(tensor.numel() for tensor in tensors_in(thing)) == [1, 2]


@pytest.mark.parametrize("interval", [0, -1, 1.5, True])
def test_the_interval_is_checked(interval):
    with pytest.raises(ValueError, match="held_memory: interval"):
        HeldMemory(interval)
