"""Expanders that are attached to optimizers of every kind."""

import warnings

import pytest
import torch
from helpers import tiny_llama

from apex_composer import Expander, find_sites

LR = 1e-2


def make_expander(model, **settings) -> Expander:
    expander = Expander(find_sites(model), threshold=0.25, method="random", **settings)
    expander.begin_stage()
    return expander


def refused(model, optimizer, told: str) -> None:
    """Nothing moves, and the optimizer keeps no hook."""
    expander = make_expander(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        expander.attach(optimizer)
    assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def warned_about(make, **settings) -> list[str]:
    """What attaching an optimizer warns about."""
    model = tiny_llama(layers=1)
    expander = make_expander(model, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expander.attach(make(model.parameters(), lr=LR))
    return [str(warning.message) for warning in caught]
