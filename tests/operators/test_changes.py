"""What autograd's version counters tell: in gradients of every kind a loop may have."""

import pytest
import torch
from torch.utils.weak import TensorWeakRef

from apex_composer.operators.changes import Gradients, version


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.clamp_(0.5),
        lambda p: p.copy_(torch.zeros(3)),
        lambda p: torch._foreach_mul_([p], 2.0),
        lambda p: setattr(p, "data", p.data.clone()),
    ],
    ids=["clamp", "copy", "foreach", "replaced"],
)
def test_a_written_or_replaced_tensor_has_another_version(weight, change):
    before = version(weight)
    assert version(weight) == before
    with torch.no_grad():
        change(weight)
    assert version(weight) != before


def backward(weight: torch.Tensor) -> None:
    (2 * weight).sum().backward()


def test_gradients_that_nothing_has_written_are_unchanged(weight):
    backward(weight)
    seen = Gradients([weight])
    assert seen.any_unchanged()
    assert not Gradients([torch.nn.Parameter(torch.ones(3))]).any_unchanged()


def test_gradients_that_are_cleared_and_accumulated_again_are_others(weight):
    backward(weight)
    seen = Gradients([weight])
    weight.grad.zero_()
    assert not seen.any_unchanged()
    backward(weight)
    assert not seen.any_unchanged()


def test_another_gradient_in_the_same_memory_written_as_often_is_another(weight):
    """An allocator gives the memory of a dropped gradient to the next one."""
    backward(weight)
    weight.grad.mul_(1.0)
    seen, before = Gradients([weight]), version(weight.grad)
    other = weight.grad.data  # versions are counted from 0 again
    weight.grad = other.mul_(1.0)
    assert version(weight.grad) == before
    assert not seen.any_unchanged()


def test_gradients_are_not_kept_alive(weight):
    backward(weight)
    gone = TensorWeakRef(weight.grad)
    seen = Gradients([weight])
    weight.grad = None
    assert gone() is None and not seen.any_unchanged()
