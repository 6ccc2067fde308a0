"""What a model loses without its strongest, its weakest, or random heads and channels (table 4).

Paper, appendix B.1: "masking high-activation 10% parameters results in a significant decline in
model performance, rendering the model nearly unusable. In contrast, masking low-activation 10%
parameters has little to no effect". Table 4, exact match: 12.0; min masked 12.0, top 0.0, random
11.5.

The paper does not say what exactly is masked, and this is our choice:
    - a masked unit gives zero: what it hands to the output projection (o_proj, down_proj) is set to
      zero, which is the same as zeroing its columns there; biases of the output projection stay;
    - `share` is taken of every group, the heads and the channels of every layer alike, not of the
      whole model, in which a few layers could lose all; it is rounded, halves up;
    - "high-activation" is the mean norm (`average`), as in the paper's section 2, where the table
      belongs; `rank` takes eq. 3's score. They come from the same data that the model is then
      measured on;
    - equal values go to the lower unit, as in training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apex_composer.assessment.scores import GroupTotals, indicator_of_largest
from apex_composer.assessment.selection import seeded_generator
from apex_composer.model.sites import Group
from apex_composer.observe.predictions import Domains, Predictions, predict

Which = Literal["top", "lowest", "random"]
WHICH: tuple[Which, ...] = ("lowest", "top", "random")
MASK_BY = ("average", "rank")


def choose_all_masked(
    groups: Sequence[Group],
    totals: Mapping[str, GroupTotals],
    which: Which,
    share: float,
    *,
    mask_by: str = "average",
    seed: int = 17,
) -> dict[str, Tensor]:
    """Units of every group to mask, see `choose_masked`.

    Args:
        groups: heads and channels of the model.
        totals: what was collected of them.
        which: `top`, `lowest` or `random`.
        share: of each group's units, in (0, 1].
        mask_by: `average` (mean norms) or `rank` (scores), what `top` and `lowest` go by.
        seed: of random ones.

    Raises:
        ValueError: where it would mask nothing.
    """
    values = {name: total.ranked_by(mask_by) for name, total in totals.items()}
    hidden = {g.name: choose_masked(g, values[g.name], which, share, seed) for g in groups}
    if not any(units.any() for units in hidden.values()):
        largest = max(group.units for group in groups)
        raise ValueError(
            f"--mask {share} masks nothing: no group has more than {largest} units. Allowed here: "
            f"{0.5 / largest:g} to 1"
        )
    return hidden


def measure_masked(
    model: nn.Module,
    domains: Domains,
    groups: Sequence[Group],
    hidden: Mapping[str, Tensor],
    *,
    batch_size: int = 8,
    title: str = "masked",
) -> Predictions:
    """Predictions of the model without some of its units."""
    with masked(groups, hidden):
        return predict(model, domains, batch_size=batch_size, title=title)


def describe_masking(found: Predictions, whole: Predictions) -> dict[str, Any]:
    """A row of the table, beside the whole model's predictions of the same samples.

    Returns:
        `loss` (nats per token), its `standard_error` over the samples, `perplexity`, `exact_match`
        (share of the answers; None without answers), `loss_change` and `loss_change_error`: the
        change against the whole model and its standard error, of pairs: the samples are the same,
        so that most of what makes one harder than another drops out.
    """
    own, change = found.mean_loss(), found.mean_change(whole)
    return {
        "loss": own.loss,
        "standard_error": own.error,
        "perplexity": own.perplexity,
        "exact_match": None if found.exact is None else float(found.exact.double().mean()),
        "loss_change": change.loss,
        "loss_change_error": change.error,
    }


def count_masked(groups: Sequence[Group], hidden: Mapping[str, Tensor]) -> dict[str, int]:
    """How many `heads` and `channels` are masked, in the whole model."""
    counts: dict[str, int] = {}
    for group in groups:
        name = f"{group.unit}s"
        counts[name] = counts.get(name, 0) + int(hidden[group.name].sum())
    return counts


def choose_masked(group: Group, values: Tensor, which: Which, share: float, seed: int) -> Tensor:
    """Units of a group to mask, [units] bool, round(share * units) of them true (halves up).

    Random ones depend on the seed and the group's name alone, and those of a smaller share are
    among those of a larger one, so that a curve over shares is one of growing sets.

    Args:
        group: heads or channels of a layer.
        values: what units are ranked by, [units].
        which: `top`, `lowest` or `random`.
        share: in (0, 1].
        seed: of random ones.
    """
    count = math.floor(share * group.units + 0.5)
    if count == 0:
        return torch.zeros(group.units, dtype=torch.bool)
    if which == "random":
        generator = seeded_generator(seed, "masking", group.name)
        values = torch.rand(group.units, generator=generator, dtype=torch.float64)
    return indicator_of_largest(-values if which == "lowest" else values, count)


@contextmanager
def masked(groups: Sequence[Group], hidden: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the given units of a model give zero; afterwards, also on an error, all as before.

    Weights are not touched: hooks set what the units hand to their output projection to zero.

    Args:
        groups: heads and channels of the model.
        hidden: by group's name, [units] bool, true where a unit is masked.
    """
    handles = []
    try:
        for group in groups:
            columns = hidden[group.name].repeat_interleave(group.unit_size)
            hook = _zeroing(columns.to(group.probe.weight.device))
            handles.append(group.probe.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeroing(columns: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    def zero(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(columns, 0), *inputs[1:])

    return zero
