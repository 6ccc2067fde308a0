"""Weak units start as copies of strong ones instead of from where they are.

A strong unit i and its copy n compute the same, and what i handed on is shared out between them:

    rows (gate, up; q, k, v):  W[n] = W[i]
    columns (down, o):         W[:, n] = (1 - a) W[:, i],   W[:, i] = a W[:, i],   a in (0.3, 0.7)

so that the model computes what it did before without unit n: the weak unit is dropped, the strong
one's function is kept. Sources: Chen, Goodfellow and Shlens, Net2Net, ICLR 2016; Wu et al.,
Firefly neural architecture descent, NeurIPS 2020. Adam takes steps of one size whatever a gradient
is multiplied by, so unequal shares alone hardly part the two: `split_similarity` says how far they
have come. Noise on the copies, as in Net2Net, parts them a little more, and is not exact.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apex_composer import Expander
from apex_composer.assessment.selection import Selection, seeded_generator
from apex_composer.model.sites import Site

LOWEST_SHARE, HIGHEST_SHARE = 0.3, 0.7


def split_selections(expander: Expander) -> dict[str, Selection]:
    """Units to copy, and those they are copied to, by group.

    A query head reads the keys and values of its KV head, so heads are copied with their KV head
    and all of its query heads: as the KV heads are selected. Heads whose KV heads are left alone
    (grouped-query attention at a low threshold) are left alone too.
    """
    found = {}
    for group in expander.groups:
        selection = expander.selections[group.name]
        if group.unit == "channel":
            found[group.name] = selection
        elif group.unit == "kv_head":
            heads = group.assessed_by
            own = torch.arange(heads.units).view(group.units, -1)
            found[group.name] = selection
            found[heads.name] = Selection(*(own[units].flatten() for units in selection))
    return found


def split_sites(expander: Expander) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Every site that is split, with the indices of the strong and of the weak units."""
    selections = split_selections(expander)
    for site in expander.sites:
        if site.group.name in selections:
            strong, weak = selections[site.group.name]
            device = site.weight.device
            yield site, site.indices(strong.to(device)), site.indices(weak.to(device))


@torch.no_grad()
def split(
    expander: Expander, optimizer: torch.optim.Optimizer, seed: int, noise: float = 0.0
) -> None:
    """Make the stage's weak units copies of its strong ones; forget the moments of what changed.

    Args:
        expander: at the beginning of a stage, T = 0.
        optimizer: of the weights.
        seed: of the shares and the noise.
        noise: normal numbers that are added to the copied rows, over the root mean square of all
            numbers copied of the weight. Default 0: exact copies.
    """
    for site, strong, weak in split_sites(expander):
        if _are_outputs(site):
            generator = seeded_generator(seed, "noise", expander.stage, site.name)
            for parameter in site.parameters():
                _copy(parameter, _dim(site, parameter), strong, weak, noise, generator)
                _forget(optimizer, parameter, _dim(site, parameter), weak)
        else:
            generator = seeded_generator(seed, "shares", expander.stage, site.name)
            _share(site, strong, weak, generator)
            _forget(optimizer, site.weight, site.axis, torch.cat([strong, weak]))


def _are_outputs(site: Site) -> bool:
    return site.axis == int(site.transposed)


def _dim(site: Site, parameter: nn.Parameter) -> int:
    return site.axis if parameter.dim() == 2 else 0


def _copy(
    parameter: nn.Parameter, dim: int, strong: Tensor, weak: Tensor, noise: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    rows = parameter.index_select(dim, strong)
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    rows += noise * rows.square().mean().sqrt() * drawn
    parameter.index_copy_(dim, weak, rows)


def _share(site: Site, strong: Tensor, weak: Tensor, generator: torch.Generator) -> None:
    size = site.group.unit_size
    drawn = torch.rand(len(strong) // size, generator=generator, dtype=torch.float64)
    shares = LOWEST_SHARE + (HIGHEST_SHARE - LOWEST_SHARE) * drawn
    shares = shares.repeat_interleave(size).to(site.weight)
    shares = shares.unsqueeze(1 - site.axis)
    columns = site.weight.index_select(site.axis, strong)
    site.weight.index_copy_(site.axis, strong, columns * shares)
    site.weight.index_copy_(site.axis, weak, columns * (1 - shares))


def _forget(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int, changed: Tensor
) -> None:
    """Moments of rows or columns from zero; AdamW's count of steps is the whole weight's.

    Without the correction of a count from zero the first updates are smaller than usual, 0.45
    times the learning rate, and at most 1.1 times afterwards.
    """
    for moment in optimizer.state.get(parameter, {}).values():
        if torch.is_tensor(moment) and moment.shape == parameter.shape:
            moment.index_fill_(dim, changed, 0)


@torch.no_grad()
def split_similarity(expander: Expander) -> float:
    """Mean cosine between the rows of the strong units and of what began as their copies."""
    found = []
    for site, strong, weak in split_sites(expander):
        if _are_outputs(site):
            first, second = (site.weight.index_select(site.axis, i) for i in (strong, weak))
            cosines = nn.functional.cosine_similarity(first, second, dim=1 - site.axis)
            found.append(float(cosines.mean()))
    return sum(found) / len(found)
