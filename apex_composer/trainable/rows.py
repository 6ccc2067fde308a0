"""Trained rows of a weight (columns at axis 1), held in full precision beside the model.

The model holds W_eff, in its own precision, at every moment. The rows' copies are what training
acts on: they take the place of the whole weight for operators and optimizer, as a site of their own
whose units are the trained ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apex_composer.assessment.selection import Selection
from apex_composer.model.sites import Site
from apex_composer.sharding.shards import Shard


@dataclass(frozen=True, eq=False)
class Part:
    """The trained entries that this rank holds of a weight or bias.

    Attributes:
        shard: what this rank holds of the model's own parameter.
        axis: where the rows lie; 0 for a bias, which is a matrix of one column.
        local: which entries along the axis, counted from the first that this rank holds, int64.
        copy: the trained ones as a leaf, [k, columns], [rows, k] or [k].
        gathered: the same as a shard of the matrix of all ranks' trained entries.
    """

    shard: Shard
    axis: int
    local: Tensor
    copy: nn.Parameter
    gathered: Shard

    def take(self, tensor: Tensor) -> Tensor:
        """The trained entries of the parameter or of its gradient, in the shape of the copy."""
        taken = self._held(tensor).index_select(self.axis, self.local)
        return taken.to(self.copy.dtype).view_as(self.copy)

    @torch.no_grad()
    def write(self) -> None:
        """Put the copy into the model, rounded to the model's precision."""
        held = self._held(self.shard.parameter)
        rows = self.copy.detach().view(-1, 1) if self.copy.dim() == 1 else self.copy.detach()
        held.index_copy_(self.axis, self.local, rows.to(held.dtype))

    @torch.no_grad()
    def take_changes(self) -> None:
        """Entries of the model that are no longer what was written of the copy are taken over."""
        held = self.take(self.shard.parameter)
        changed = held != self.copy.to(self.shard.parameter.dtype).to(held.dtype)
        if changed.any():
            self.copy.copy_(torch.where(changed, held, self.copy))

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the trained entries of a gradient to the copy's."""
        taken = self.take(gradient)
        self.copy.grad = taken if self.copy.grad is None else self.copy.grad.add_(taken)

    def whole(self, tensor: Tensor) -> Tensor:
        """All ranks' entries of a tensor in the copy's shape, on the CPU (collective)."""
        own = tensor.detach().to("cpu", copy=True)
        group = self.gathered.process_group
        if group is None or not self._cut(tensor):
            return own
        parts: list[Tensor] = [own] * group.size()
        torch.distributed.all_gather_object(parts, own, group=group)
        return torch.cat(parts)

    def own(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's entries of a tensor that `whole` has put together."""
        first = self.gathered.start // self.gathered.shape[1] if self._cut(like) else 0
        return whole[first : first + like.shape[0]]

    def _cut(self, tensor: Tensor) -> bool:
        """Whether ranks hold different entries: not of one number for each trained column."""
        return self.axis == 0 or tensor.dim() == 2

    def _held(self, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        return local.view(-1, self.shard.shape[1])


class _Copies(nn.Module):
    """Holds the copies as a projection holds weight and bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias


@dataclass(frozen=True, eq=False)
class Rows:
    """The trained units of one site.

    Attributes:
        site: the model's own.
        units: [u] ascending int64, of the site's group.
        parts: of the weight, and of the bias that is trained with it.
        copies: the site that operators and optimizer act on; its units are the trained ones.
    """

    site: Site
    units: Tensor
    parts: list[Part]
    copies: Site

    def selection(self, selection: Selection) -> Selection:
        """The same units by their places among the trained ones."""
        return Selection(*(torch.searchsorted(self.units, chosen) for chosen in selection))

    def shards(self) -> list[Shard]:
        """What `make_executors` needs to know of the copies."""
        return [part.gathered for part in self.parts]


def make_rows(site: Site, shards: Sequence[Shard], units: Tensor) -> Rows:
    """Copies of a site's trained units as the model holds them now.

    Args:
        site: the model's.
        shards: of its weight, and bias, see `find_shards`.
        units: [u] ascending int64, of the site's group.
    """
    parts = [_part(site, shard, units, bias=place > 0) for place, shard in enumerate(shards)]
    module = _Copies(parts[0].copy, parts[1].copy if len(parts) == 2 else None)
    group = replace(site.group, units=len(units))
    copies = replace(site, module=module, group=group, offset=0, stride=None, model=None)
    return Rows(site, units, parts, copies)


def _part(site: Site, shard: Shard, units: Tensor, bias: bool) -> Part:
    rows, columns = shard.shape
    first, last = shard.start // columns, shard.stop // columns
    axis = 0 if bias else site.axis
    indices = site.indices(units)
    if axis == 0:
        begin, end = torch.searchsorted(indices, torch.tensor([first, last])).tolist()
        local, shape = indices[begin:end] - first, (len(indices), columns)
        interval = begin * columns, end * columns
    else:
        local, shape = indices, (rows, len(indices))
        interval = first * len(indices), last * len(indices)
    parameter = shard.parameter
    local = local.to(parameter.device)
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    held = held.detach().view(-1, columns).index_select(axis, local)
    held = held.to(torch.promote_types(held.dtype, torch.float32))
    copy = nn.Parameter(held.flatten() if bias else held)
    gathered = replace(shard, parameter=copy, shape=shape, start=interval[0], stop=interval[1])
    return Part(shard, axis, local, copy, gathered)


@torch.no_grad()
def carry(old: Rows, new: Rows, tensors: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
    """Write what belongs to the rows that stay trained over the fresh ones.

    Args:
        old: the rows of the stage before.
        new: those of the next stage.
        tensors: one for each part of the old rows, in the shape of its copy.
        fresh: the same of the new rows, changed in place.
    """
    for before, after, source, target in zip(old.parts, new.parts, tensors, fresh, strict=True):
        stays = torch.isin(after.local, before.local)
        places = torch.searchsorted(before.local, after.local[stays])
        axis = after.axis if source.dim() == 2 else 0  # one number for each row, or column
        values = source.index_select(axis, places)
        target.index_copy_(axis, stays.nonzero().flatten(), values)
