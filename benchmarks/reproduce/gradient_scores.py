"""Units by what the loss would lose with them, instead of by the norm of their activation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from reproduce.model import token_losses
from torch import Tensor, nn

from apex_composer import Expander
from apex_composer.assessment.scores import GroupTotals
from apex_composer.assessment.selection import select
from apex_composer.model.sites import Group

SCORES = ("gradient", "gradient_weak")


def gradient_scores(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Mean over tokens of |sum over a unit's numbers of activation x dLoss/dactivation|.

    To first order it is what a token's unit is worth to the loss. Source: Molchanov et al.,
    Importance estimation for neural network pruning, CVPR 2019; for heads Michel et al., Are
    sixteen heads really better than one, NeurIPS 2019, eq. 3. Gradients of weights are not touched.

    Args:
        model: its weights need gradients.
        groups: heads and channels.
        batches: [windows, length + 1] each.

    Returns:
        [units] float64 by group's name.
    """
    sums = {group.name: 0.0 for group in groups}
    for batch in batches:
        with unit_activations(groups) as activations:
            loss = token_losses(model, batch).mean()
        found = torch.autograd.grad(loss, [activations[group.name] for group in groups])
        for group, gradient in zip(groups, found, strict=True):
            product = activations[group.name].detach().double() * gradient.double()
            worth = product.unflatten(-1, (group.units, group.unit_size)).sum(-1).abs()
            sums[group.name] = sums[group.name] + worth.flatten(0, -2).mean(0)
    return {name: total / len(batches) for name, total in sums.items()}


@contextmanager
def unit_activations(groups: Sequence[Group]) -> Iterator[dict[str, Tensor]]:
    """By group's name, what its units hand to their output projection in a forward pass."""
    found: dict[str, Tensor] = {}
    handles = [
        group.probe.register_forward_pre_hook(
            lambda module, inputs, name=group.name: found.update({name: inputs[0]})
        )
        for group in groups
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def score_by_gradients(
    expander: Expander, model: nn.Module, batches: Sequence[Tensor], scores: str
) -> None:
    """Let the next stage's units go by gradients.

    Args:
        expander: one whose `method` is `average`, between assessment and `begin_stage`.
        model: that it acts on.
        batches: [windows, length + 1] each.
        scores: `gradient`; or `gradient_weak`: the strong ones go by rank as ever, and the weak
            ones are those of the others that are worth least.

    Raises:
        ValueError: for other scores, or `gradient_weak` with grouped-query attention.
    """
    if scores not in SCORES:
        raise ValueError(f"scores: got {scores!r}, allowed: {', '.join(SCORES)}")
    totals = expander.assessment.totals()
    groups = {
        (group.assessed_by or group).name: group.assessed_by or group for group in expander.groups
    }
    found = gradient_scores(model, list(groups.values()), batches)
    if scores == "gradient_weak":
        _check_ungrouped(expander.groups)
        found = {
            name: strong_first(totals[name].scores, own, expander.counts[name])
            for name, own in found.items()
        }
    own = {name: GroupTotals(totals[name].scores, found[name], samples=1) for name in found}
    expander.assessment.load_totals(own)


def _check_ungrouped(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.assessed_by is not None and group.units < group.assessed_by.units:
            raise ValueError(
                f"gradient_weak: {group.name} has {group.units} key heads of "
                f"{group.assessed_by.units} query heads: sums over raised values would not be "
                "those of rank. Allowed: as many key heads as query heads"
            )


def strong_first(scores: Tensor, values: Tensor, count: int) -> Tensor:
    """The values, with the `count` units of highest score above all others.

    Args:
        scores: [units], what the strong ones go by.
        values: [units], what the others go by.
        count: K.
    """
    raised = values.clone()
    raised[select(scores, count).advantageous] = values.max() + 1
    return raised
