"""Optimizers of Composer, llm-foundry and torch_optimizer: followed, warned about, or refused."""

import pytest
import torch_optimizer
from attaching import LR, make_expander, refused, warned_about
from composer.algorithms.sam.sam import SAMOptimizer
from helpers import tiny_llama
from llmfoundry.optim import DecoupledLionW, NoOp
from torch.optim import AdamW


@pytest.mark.parametrize(
    "make",
    [
        torch_optimizer.Ranger,
        torch_optimizer.MADGRAD,
        lambda parameters, lr: torch_optimizer.Lookahead(AdamW(parameters, lr)),
    ],
    ids=["Ranger", "MADGRAD", "Lookahead"],
)
def test_optimizers_with_weights_of_their_own_are_refused(make):
    model = tiny_llama(layers=1)
    refused(model, make(model.parameters(), lr=LR), "keeps weights of its own.*Use AdamW")


@pytest.mark.parametrize("make", [DecoupledLionW, torch_optimizer.Lamb])
def test_learning_rates_of_another_size_are_warned_about(make):
    (told,) = warned_about(make)
    assert told.startswith("operator_lr_scale: not given") and make.__name__ in told
    assert warned_about(make, operator_lr_scale=1.0) == []


def test_an_optimizer_that_does_nothing_is_warned_about():
    assert len(warned_about(lambda parameters, lr: NoOp(parameters))) == 1


def test_adams_relative_is_followed_without_a_word():
    assert warned_about(torch_optimizer.AdaBelief) == []


def test_an_optimizer_around_another_may_keep_none_of_its_own():
    """Composer's SAM keeps what it has added to the weights, not the weights."""
    model = tiny_llama(layers=1)
    make_expander(model, operator_lr_scale=1.0).attach(
        SAMOptimizer(AdamW(model.parameters(), lr=LR))
    )
