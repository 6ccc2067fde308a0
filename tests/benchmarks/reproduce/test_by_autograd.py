"""Variations of the operators against training by autograd: two stages, weights and factors."""

import pytest
import torch
from autograd_oracle import Oracle, assert_same, expanded, monarch, train_exactly
from reproduce.arms import Arm
from tiny_arms import start

RATE, STEPS = 5e-3, 3


def leaves_of(operators, variation):
    """By site: what T is made of, as the variation says; checked against what a stage begins with.

    One pair of leaves for gate and up of a layer where they are tied.
    """
    found = {}
    for operator in operators:
        left, right = (factor.detach().clone() for factor in operator.factors)
        name, size = operator.site.name, len(operator.advantageous)
        assert not left.any()
        if variation.get("dense"):
            found[name] = [torch.zeros(size, size, dtype=torch.float64).requires_grad_()]
        elif variation.get("tied") and "up_proj" in name:
            found[name] = found[name.replace("up_proj", "gate_proj")]
            assert torch.equal(found[name][1], right)
        else:
            found[name] = [left.requires_grad_(), right.requires_grad_()]
    return found


def effective_of(operators, leaves):
    def effective(base):
        weights = dict(base)
        for operator in operators:
            name, own = operator.site.name, leaves[operator.site.name]
            matrix = own[0] if len(own) == 1 else monarch(*own)
            sets = operator.advantageous, operator.disadvantageous
            weights[name] = expanded(weights[name], operator.site.axis, matrix, *sets)
        return weights

    return effective


@pytest.mark.parametrize(
    "variation",
    [
        {}, {"right_scale": 3.0}, {"dense": True}, {"tied": True}, {"decay": 0.5},
        {"sites": "ffn"}, {"sites": "attention"}, {"scores": "gradient_weak"}, {"split": True},
    ],
    ids=str,
)  # fmt: skip
def test_two_stages_are_those_of_autograd(variation):
    started = start(Arm("arm", apex={"threshold": 0.25}, variation=variation), double=True)
    oracle = Oracle(started)
    for stage in range(2):
        started.varied.begin(stage)
        operators = list(started.varied.expander.operators)
        leaves = leaves_of(operators, variation)
        unique = {id(leaf): leaf for own in leaves.values() for leaf in own}
        assert len(operators) == {"ffn": 6, "attention": 8}.get(variation.get("sites"), 14)
        oracle.begin(effective_of(operators, leaves), unique.values(), variation.get("decay", 0.0))
        if variation.get("split"):
            oracle.adopt()
        places = range(5 * stage, 5 * stage + STEPS)
        train_exactly(started, places, RATE)
        oracle.train(places, RATE)
        assert_same(started, oracle)
        moved = max(float(leaf.detach().abs().max()) for own in leaves.values() for leaf in own)
        assert moved > RATE
