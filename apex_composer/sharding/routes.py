"""Who sends which entries of sharded weights to whom. Pure: no communication, no weights.

An operator mixes the n selected rows of a weight, column by column (axis 0; axis 1 is the
transpose), so the free axis can be divided between the ranks: the *worker* of an entry is the
rank that computes with its column, the *owner* the one that holds it.

    axis 0   rank s works on the s-th slice of the columns, for all n rows
    axis 1   the rank that holds the first entry of a row works on that row, which then lies
             whole on it unless FSDP1 cut it: only the selected entries of cut rows travel

A route moves the entries of one set of indices (P or N) of all matrices in one buffer, cut into
one chunk per peer. Both ends list a chunk's entries in the same order: matrix by matrix, then by
index, then along the free axis. A chunk holds first blocks of one length, each the slice of a row
that one owner holds whole (and padding where the slice is shorter), then single entries (biases,
rows that FSDP1 cut) and padding to the next block. So the index of a route has a number for every
slice of a row, and for every entry of the few rows that are cut.

Shape legend
    n   indices of a set            S   ranks that share the weights
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight or bias of one site, and who holds what of it.

    Attributes:
        shape: (rows, columns).
        axis: 0 or 1, where the indices lie.
        intervals: [start, stop) of the row-major matrix that each rank holds, in rank order.
        sets: {"P": [n] int64, "N": [n] int64}, on the CPU.
    """

    shape: tuple[int, int]
    axis: Literal[0, 1]
    intervals: tuple[tuple[int, int], ...]
    sets: dict[str, Tensor]

    @property
    def single(self) -> bool:
        """Whether its entries travel one by one: cut rows, and biases (one column)."""
        return self.axis == 1 or self.shape[1] == 1

    def owner(self, positions: Tensor) -> Tensor:
        """The rank that holds each flat position, same shape."""
        held = sorted(
            (start, rank) for rank, (start, stop) in enumerate(self.intervals) if stop > start
        )
        starts, ranks = (torch.tensor(column) for column in zip(*held, strict=True))
        return ranks[torch.searchsorted(starts, positions, right=True) - 1]

    def whole(self, rows: Tensor) -> Tensor:
        """Which rows one rank holds all of, same shape, bool."""
        first = rows * self.shape[1]
        return self.owner(first) == self.owner(first + self.shape[1] - 1)

    def cut_rows(self) -> Tensor:
        """The rows that several ranks share."""
        rows = {start // self.shape[1] for start, stop in self.intervals if stop > start}
        rows = torch.tensor(sorted(rows))
        return rows[~self.whole(rows)]


@dataclass(frozen=True)
class Rows:
    """Rows that begin on one rank: `whole` ones from `first`, then perhaps a cut one.

    At axis 1 these are the rows that the rank works on.

    Attributes:
        first: the first row that begins on this rank.
        whole: rows from there on that this rank holds whole.
        cut: whether one more row begins here and ends on another rank.
    """

    first: int
    whole: int
    cut: bool


@dataclass(frozen=True, eq=False)
class Lane:
    """Blocks, or single entries, on one side of a route.

    Attributes:
        positions: [entries] int64, where each lies in the buffer, counted in blocks or in numbers.
        parts: how many of them belong to each matrix.
        local: what they belong to, int64, by matrix. Owners: of blocks the rows, counted from the
            first whole one; of single entries the places in their part of the weight. Workers:
            the places in the set of the rows that they make up (axis 0).
    """

    positions: Tensor
    parts: list[int]
    local: list[Tensor]


@dataclass(frozen=True, eq=False)
class Side:
    """One end of a route: a buffer with `sizes[peer]` numbers for every peer."""

    sizes: list[int]
    blocks: Lane
    singles: Lane


@dataclass(frozen=True, eq=False)
class Route:
    """The entries of one set of indices, between their owners and their workers."""

    owners: Side
    workers: Side


@dataclass(frozen=True, eq=False)
class Routes:
    """One rank's part in all exchanges of a stage.

    Attributes:
        block: numbers in a block, the longest slice of a row.
        of: {"P": Route, "N": Route}.
        widths: length of the free axis that this rank works on, by matrix.
        rows: those that begin on this rank, by matrix.
    """

    block: int
    of: dict[str, Route]
    widths: list[int]
    rows: list[Rows]


def lay_routes(
    matrices: Sequence[Matrix], rank: int, ranks: int, device: torch.device | str = "cpu"
) -> Routes:
    """What one rank sends and receives, the same routes on every rank seen from its own side.

    Args:
        matrices: weights and biases of all operators, in the same order on every rank.
        rank: number among those that share the weights.
        ranks: S.
        device: the one that the indices are used on, default the CPU.
    """
    block = max((-(-m.shape[1] // ranks) for m in matrices if not m.single), default=1)
    rows = [_rows(matrix, rank) for matrix in matrices]
    widths = [
        own.whole + own.cut if m.axis == 1 else min(max(m.shape[1] - rank * block, 0), block)
        for m, own in zip(matrices, rows, strict=True)
    ]
    routes = {}
    for name in ("P", "N"):
        ends = [_ends(m, m.sets[name], rank, block) for m in matrices]
        sides = (_side(entries, ranks, block, device) for entries in zip(*ends, strict=True))
        routes[name] = Route(*sides)
    return Routes(block, routes, widths, rows)


def _rows(matrix: Matrix, rank: int) -> Rows:
    (start, stop), columns = matrix.intervals[rank], matrix.shape[1]
    first, last = -(-start // columns), stop // columns
    return Rows(first, max(last - first, 0), last >= first and stop > last * columns)


# Blocks and single entries: peers [entries], and what they belong to, see `Lane.local`.
_Entries = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _ends(matrix: Matrix, indices: Tensor, rank: int, block: int) -> tuple[_Entries, _Entries]:
    """What of a matrix leaves this rank as its owner, and what comes to it as a worker."""
    columns, places = matrix.shape[1], torch.arange(len(indices))
    slices = torch.arange(-(-columns // block))
    if matrix.axis == 1:
        rows, whole, cut = matrix.cut_rows(), places[:0], places[:0]
        positions = rows.unsqueeze(1) * columns + indices
        workers = matrix.owner(rows * columns).unsqueeze(1)
    else:
        in_blocks = matrix.whole(indices) & (not matrix.single)
        whole, cut = places[in_blocks], places[~in_blocks]
        positions = indices[cut].unsqueeze(1) * columns + torch.arange(columns)
        workers = torch.arange(columns) // block
    owners, workers = matrix.owner(positions), workers.expand_as(positions)
    row_owners = matrix.owner(indices[whole] * columns)
    held, done = owners == rank, workers == rank
    held_rows = indices[whole][row_owners == rank] - _rows(matrix, rank).first
    held_places = positions[held] - matrix.intervals[rank][0]
    here = slice(None if rank < len(slices) else 0)  # the last ranks' slices may be empty
    return (
        ((slices.repeat(len(held_rows)), held_rows), (workers[held], held_places)),
        ((row_owners[here], whole[here]), (owners[done], cut[here])),
    )


def _side(entries: Sequence[_Entries], ranks: int, block: int, device: torch.device | str) -> Side:
    """Lay the entries of all matrices out in one buffer, chunk after chunk."""
    blocks, singles = zip(*entries, strict=True)
    block_counts, single_counts = (
        torch.cat([peers for peers, _ in lane]).bincount(minlength=ranks)
        for lane in (blocks, singles)
    )
    sizes = (block_counts + (single_counts + block - 1) // block) * block
    begins = sizes.cumsum(0) - sizes
    return Side(
        sizes.tolist(),
        _lane(blocks, begins // block, device),
        _lane(singles, begins + block_counts * block, device),
    )


def _lane(
    entries: Sequence[tuple[Tensor, Tensor]], begins: Tensor, device: torch.device | str
) -> Lane:
    """Entries one behind the other, those for every peer from where its chunk begins."""
    peers = torch.cat([of_matrix for of_matrix, _ in entries])
    order, counts = peers.argsort(stable=True), peers.bincount(minlength=len(begins))
    shifts = begins - (counts.cumsum(0) - counts)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order)) + shifts[peers[order]]
    parts = [len(of_matrix) for of_matrix, _ in entries]
    return Lane(positions.to(device), parts, [local.to(device) for _, local in entries])
