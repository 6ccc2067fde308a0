"""Units that masking does not miss, made for a base: the paper's premise (its table 4).

The units of lowest norm in every layer are made to do next to nothing,

    W_v[n] <- SIZE * W_v[n],   W_up[n] <- SIZE * W_up[n],

which makes what they hand to the output projection SIZE times as large, and all their weights are
held there while the others are trained on and take over what these did. Clipping, decay and
moments are those of the whole model.
"""

from collections.abc import Callable, Sequence

import torch
from reproduce.stage_facts import assess_units
from torch import Tensor, nn

from apex_composer import find_sites
from apex_composer.observe.masking import choose_all_masked

SIZE = 0.01
# Sites whose rows a unit's output is a multiple of.
_OUTPUTS = ("v_proj", "up_proj")


@torch.no_grad()
def make_idle(model: nn.Module, batches: Sequence[Tensor], share: float) -> Callable[[], None]:
    """Make the weakest units of every layer idle.

    Args:
        model: a Llama with as many KV heads as heads.
        batches: [windows, length + 1] each, of which norms are taken.
        share: of every layer's heads and channels, rounded, halves up.

    Returns:
        What puts the idle units' weights back as they are now, to be called after every step.

    Raises:
        ValueError: where several heads share a KV head, which cannot be held for one of them.
    """
    assessed_groups, totals, _ = assess_units(model, batches)
    hidden = choose_all_masked(assessed_groups, totals, "lowest", share)
    held = []
    for site in find_sites(model):
        assessed = site.group.assessed_by or site.group
        if assessed.units != site.group.units:
            raise ValueError(
                f"{site.name}: {assessed.units} heads share {site.group.units} KV heads, and idle "
                "heads need one each"
            )
        weight, axis = site.weight, site.axis
        places = site.indices(hidden[assessed.name].nonzero().flatten()).to(weight.device)
        values = weight.index_select(axis, places)
        if site.name.split(".")[-2] in _OUTPUTS:
            values *= SIZE
        held.append((weight, axis, places, values))

    @torch.no_grad()
    def hold() -> None:
        for weight, axis, places, values in held:
            weight.index_copy_(axis, places, values)

    hold()
    return hold
