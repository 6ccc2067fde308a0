"""Other operators than those of the paper, made of the same parts.

They act between the expander's own steps: on the factors as a stage begins, before anything is
trained, and on their gradients once these are mapped, while the model holds the base weights.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from reproduce.arms import Arm

from apex_composer import Expander
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops.monarch import MonarchFactors

OPERATORS = ("right_scale", "dense", "tied", "decay")


@torch.no_grad()
def vary_operators(expander: Expander, variation: Mapping[str, Any]) -> None:
    """Change the factors of a stage that has just begun; T stays zero.

    Args:
        expander: at the beginning of a stage.
        variation: of the arm.
    """
    if not expander.operators:
        return
    if variation.get("dense"):
        make_dense(expander)
    for operator in expander.operators:
        operator.factors.right.mul_(variation.get("right_scale", 1.0))
    if variation.get("tied"):
        for gate, up in gates_and_ups(expander):
            up.factors.right.copy_(gate.factors.right)


def make_dense(expander: Expander) -> None:
    """T = L, any n x n matrix, for all operators of a stage.

    Monarch factors with p = n, q = 1 are one block L of n x n and n blocks R of 1 x 1. R is all
    ones and stays so (`vary_steps`): trained, it would only make T learn faster.
    """
    state = expander.state_dict()
    sizes = {operator.site.name: len(operator.advantageous) for operator in expander.operators}
    state["factors"] = {name: dense_factors(size) for name, size in sizes.items()}
    state["moments"] = {}
    expander.load_state_dict(state)


def dense_factors(size: int) -> MonarchFactors:
    """L = 0 and R = 1 of an n x n operator: T = L."""
    return MonarchFactors(torch.zeros(1, size, size), torch.ones(size, 1, 1))


def gates_and_ups(expander: Expander) -> list[list[ExpansionOperator]]:
    """The operators of gate and up of every layer that has both.

    Raises:
        ValueError: where no layer has.
    """
    layers = defaultdict(list)
    for operator in expander.operators:
        site = operator.site
        if site.group.unit == "channel" and site.axis == int(site.transposed):
            layers[site.group.name].append(operator)
    pairs = [pair for pair in layers.values() if len(pair) == 2]
    if not pairs:
        raise ValueError("tied: no layer has a gate beside up whose operators could be one")
    return pairs


def vary_steps(expander: Expander, optimizer: torch.optim.Optimizer, arm: Arm) -> None:
    """Change how operators are trained, where the arm says so.

    Args:
        expander: attached to the optimizer; what is done here comes after its own hook.
        optimizer: of the weights, all with one learning rate.
        arm: its variation and its operators' learning rate.
    """
    variation, lr_scale = arm.variation, arm.apex.get("operator_lr_scale", 1.0)

    @torch.no_grad()
    def before_step(*_: Any) -> None:
        if variation.get("dense"):
            for operator in expander.operators:
                operator.factors.right.grad = None
        if variation.get("tied"):
            add_tied_gradients(expander)
        if decay := variation.get("decay"):
            decay_factors(expander, decay * lr_scale * optimizer.param_groups[0]["lr"])

    if any(variation.get(name) for name in ("dense", "tied", "decay")):
        optimizer.register_step_pre_hook(before_step)


def add_tied_gradients(expander: Expander) -> None:
    """One T for gate and up: both hold it, and both get the sum of what either would learn.

    Two copies that start equal and take equal steps stay equal, bit for bit.
    """
    for gate, up in gates_and_ups(expander) if expander.operators else []:
        for own, other in zip(gate.factors, up.factors, strict=True):
            own.grad = own.grad + other.grad
            other.grad = own.grad.clone()


def decay_factors(expander: Expander, share: float) -> None:
    """Multiply what is trained of L and R by 1 - share, as AdamW does before its step.

    The weights are unfolded at this moment, so that the fold after the step takes the new T.
    """
    for operator in expander.operators:
        for factor in operator.factors:
            if factor.grad is not None:
                factor.mul_(1 - share)
