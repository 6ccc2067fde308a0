"""Which units of a group are trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apex_composer.assessment.selection import Selection, seeded_generator
from apex_composer.model.sites import Group


def trained_units(
    trainable: str,
    groups: Sequence[Group],
    selections: Mapping[str, Selection],
    filled: Mapping[str, int],
    seed: int,
    stage: int,
) -> dict[str, Tensor]:
    """The trained units of every group, [u] ascending int64; groups without any are missing.

    Args:
        trainable: `selected`: P and N; `half`: these and randomly drawn others; `disadvantageous`:
            N alone.
        groups: all whose units can be trained.
        selections: P and N of the groups that are selected from.
        filled: of `half`, how many units of every group are drawn from the others.
        seed: the run's.
        stage: its number. Others are drawn in each.
    """
    units = {}
    for group in groups:
        chosen = [*selections.get(group.name, ())][1 if trainable == "disadvantageous" else 0 :]
        taken = torch.cat([*chosen, torch.zeros(0, dtype=torch.int64)])
        count = filled.get(group.name, 0)
        if count:
            generator = seeded_generator(seed, "trained", stage, group.name)
            order = torch.randperm(group.units, generator=generator)
            taken = torch.cat([taken, order[~torch.isin(order, taken)][:count]])
        if len(taken):
            units[group.name] = taken.sort().values
    return units
