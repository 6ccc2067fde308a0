"""Columns of a weight divided between ranks: a slice each, which travels as a block of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Slices are cut at multiples of a common length: this many to a rank even out what does not divide.
_PARTS_PER_RANK = 8


def column_edges(columns: int, ranks: int) -> list[int]:
    """Where the columns are cut into one slice per rank: `ranks + 1` ascending numbers.

    Args:
        columns: of the matrix.
        ranks: S.
    """
    unit = columns // ranks
    if columns % ranks:
        most = max(1, columns // (_PARTS_PER_RANK * ranks))
        unit = next(u for u in range(most, 0, -1) if columns % u == 0)
    return [rank * (columns // unit) // ranks * unit for rank in range(ranks + 1)]


def packing(edges: Sequence[int], unit: int) -> tuple[Tensor, Tensor] | None:
    """How a row becomes one block per slice that is not empty, and the blocks a row again.

    Args:
        edges: of the slices.
        unit: numbers in a block.

    Returns:
        For every number of the blocks a column, and for every column its place in the blocks;
        None where a row is its blocks.
    """
    columns, slices = edges[-1], filled_slices(edges)
    begins = torch.tensor([edges[i] for i in slices])
    blocks = begins.unsqueeze(1) + torch.arange(unit)
    if blocks.numel() == columns:
        return None
    widths = torch.tensor([edges[i + 1] - edges[i] for i in slices])
    skipped = torch.arange(len(slices)) * unit - begins
    return (
        blocks.flatten().clamp(max=columns - 1),
        torch.arange(columns) + skipped.repeat_interleave(widths),
    )


def filled_slices(edges: Sequence[int]) -> list[int]:
    """Which slices are not empty."""
    return [i for i, edge in enumerate(edges[:-1]) if edge < edges[i + 1]]
