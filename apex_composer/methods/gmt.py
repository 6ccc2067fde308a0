"""Gradient-mask tuning: the entries of largest gradient are trained."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce, get_rank, get_world_size

from apex_composer.extras import needing

with needing("gmt"):
    from composer.core import State

from apex_composer.methods.gradient_masks import GradientMask, Part, count_kept
from apex_composer.methods.method_checks import check_known

# Of floats that are not negative the bits, read as integers, have the same order; nan is largest.
_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


class GMT(GradientMask):
    """Trains, in every batch, the entries of each tensor whose accumulated gradient is largest.

        g <- g where |g| is among the round(share * entries) largest of its tensor, else 0

    The optimizer then does what it does with a gradient that has zeros: SGD leaves these entries
    alone, AdamW still moves an entry by its momentum and its weight decay (so that an entry with
    neither moves not at all). That is the paper's, which masks gradients and not updates.

    Our choices, where the paper is silent: the threshold is that of each tensor (of the whole
    tensor, where FSDP2 shards it), biases and norms included; of equal gradients those of lower
    index are kept, so that the number is exact; gradients are masked before they are clipped.

    Source: Gradient-Mask Tuning, https://arxiv.org/abs/2406.15330; 60 % in arXiv 2505.24241, A.2.

    Args:
        share: of every tensor's entries, in (0, 1). Default 0.6.

    Raises:
        ValueError: for a share out of range; at INIT for amp_fp16, FSDP1, tensor parallelism, and
            beside another mask or an apex that trains by itself.
        TypeError: for an unknown setting.
    """

    name = "gmt"

    def __init__(self, *, share: float = 0.6, **unknown: Any):
        check_known("gmt", unknown, GMT)
        super().__init__(share)

    def masks(self, parts: Sequence[Part], state: State) -> Iterator[tuple[Part, Tensor]]:
        """Those of the largest gradients (collective where these are sharded)."""
        alike: dict[tuple, list[Part]] = {}
        for part in parts:
            alike.setdefault((part.gradient.dtype, part.group), []).append(part)
        for (_, group), own in alike.items():
            gradients = [part.gradient for part in own]
            counts = [count_kept(part.total, self.share) for part in own]
            yield from zip(own, largest(gradients, counts, group), strict=True)


def largest(
    gradients: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup | None = None
) -> Iterator[Tensor]:
    """Which entries are the `count` largest by magnitude of each tensor, ties by lower index.

    The threshold is found bit by bit, by counting: no sort, no copy of more than one tensor, and
    one small all_reduce for all tensors of sharded ones per bit.

    Args:
        gradients: tensors of one floating dtype and any shapes, on one device; where they are
            sharded, this rank's rows.
        counts: how many entries of each whole tensor are kept.
        group: the ranks that hold the other rows. Default: these are the whole tensors.

    Yields:
        [shape of the gradient] bool, one by one.
    """
    wanted = torch.tensor(counts, device=gradients[0].device)
    found = _thresholds(gradients, wanted, group)
    above = _count(torch.gt, gradients, found)
    equal = _count(torch.eq, gradients, found)
    room = wanted - _sum(above, group) - _before(equal, group)
    for gradient, threshold, own_room in zip(gradients, found, room, strict=True):
        bits = _bits(gradient)
        ties = bits == threshold
        first = ties.flatten().cumsum(0).view(ties.shape) <= own_room
        yield (bits > threshold) | (ties & first)


def _bits(gradient: Tensor) -> Tensor:
    return gradient.abs().view(_INTEGERS[gradient.dtype])


def _thresholds(gradients: Sequence[Tensor], wanted: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of each tensor the largest bits that as many entries as wanted reach: [tensors] int64."""
    found = torch.zeros_like(wanted)
    for bit in reversed(range(8 * gradients[0].element_size() - 1)):
        higher = found | (1 << bit)
        reached = _sum(_count(torch.ge, gradients, higher), group)
        found = torch.where(reached >= wanted, higher, found)
    return found


def _count(compare, gradients: Sequence[Tensor], thresholds: Tensor) -> Tensor:
    pairs = zip(gradients, thresholds, strict=True)
    return torch.stack([compare(_bits(gradient), threshold).sum() for gradient, threshold in pairs])


def _sum(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        all_reduce(counts, group=group)
    return counts


def _before(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the counts of the ranks that hold earlier rows."""
    if group is None:
        return torch.zeros_like(counts)
    found = [torch.empty_like(counts) for _ in range(get_world_size(group))]
    all_gather(found, counts, group=group)
    return torch.stack([torch.zeros_like(counts), *found[: get_rank(group)]]).sum(0)
