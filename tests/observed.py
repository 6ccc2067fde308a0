"""Samples of several lengths and tiny models of three kinds, for the tests of observe."""

import pytest
import torch
from helpers import tokens
from tiny_models import in_float64, tiny_model

from apex_composer.evaluate.samples import Sample

# Grouped queries; biases and transposed weights; fused projections.
FAMILIES = ("llama", "gpt2", "phi3")
LENGTHS = (8, 3, 6, 8, 2, 5, 7)


@pytest.fixture(autouse=True)
def in_full_precision():
    """Imported by a test file, it runs all of its tests in float64."""
    with in_float64():
        yield


def wide_model(model_type: str):
    """Random weights, biases and norms, in float64."""
    return tiny_model(model_type, torch.float64)


def make_samples(answers: bool = False) -> list[Sample]:
    """Random ids; with answers the last 1 to 3 tokens are one."""
    rows = tokens(len(LENGTHS), 8)
    return [
        Sample(row[:length], slice(max(1, length - 1 - place % 3), length) if answers else None)
        for place, (row, length) in enumerate(zip(rows, LENGTHS, strict=True))
    ]


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model, before: dict[str, torch.Tensor]) -> None:
    """Bit-identical weights, no hook left, every module still in evaluation mode."""
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and not module.training
    assert all(parameter.grad is None for parameter in model.parameters())
