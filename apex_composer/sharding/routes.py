"""Who sends which entries of sharded weights to whom. Pure: no communication, no weights.

An operator mixes the n selected rows of a weight, column by column (axis 0; axis 1 is the
transpose), so the free axis can be divided between the ranks: the *worker* of an entry is the
rank that computes with its column, the *owner* the one that holds it.

    axis 0   rank s works on the s-th slice of the columns, for all n rows
    axis 1   the rank that holds the first entry of a row works on that row, which then lies
             whole on it unless FSDP1 cut it: only the selected entries of cut rows travel

A route moves the entries of one set of indices (P or N) of all matrices in one buffer, cut into
one chunk per peer. Both ends list a chunk's entries in the same order: matrix by matrix, then by
index, then along the free axis. A chunk holds first blocks of `unit` numbers, each the slice of a
row that one owner holds whole (and padding where the slice is shorter), then single entries
(biases, rows that FSDP1 cut) and padding to the next unit. So the index of a route has a number
for every slice of a row, and for every entry of the few rows that are cut.

Shape legend
    n   indices of a set            S   ranks that share the shards
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from apex_composer.sharding.column_slices import column_edges, filled_slices, packing


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight or bias of one site, as the plan sees it.

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

    def whole(self, indices: Tensor) -> Tensor:
        """Which of the rows travel as blocks: one rank holds all of each, [n] bool."""
        first = indices * self.shape[1]
        same = self.owner(first) == self.owner(first + self.shape[1] - 1)
        return same & (not self.single)

    def owner(self, positions: Tensor) -> Tensor:
        """The rank that holds each flat position, same shape."""
        held = sorted(
            (start, rank) for rank, (start, stop) in enumerate(self.intervals) if stop > start
        )
        starts, ranks = (torch.tensor(column) for column in zip(*held, strict=True))
        return ranks[torch.searchsorted(starts, positions, right=True) - 1]


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
        positions: [entries] int64, where each lies in the buffer, in the lane's unit.
        parts: how many of them belong to each matrix.
        local: by matrix, int64, what they belong to. Owners: of blocks the rows, counted from the
            first whole one; of single entries the places in the shard. Workers: the places in the
            set of the rows that they make up (axis 0).
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
class Plan:
    """One rank's part in all exchanges of a stage.

    Attributes:
        unit: numbers in a block: the longest slice of a row.
        routes: {"P": Route, "N": Route}.
        widths: by matrix, the length of the free axis that this rank works on.
        rows: by matrix, those that begin on this rank.
        packing: by columns of a matrix, how its rows become blocks, see `packing`.
    """

    unit: int
    routes: dict[str, Route]
    widths: list[int]
    rows: list[Rows]
    packing: dict[int, tuple[Tensor, Tensor] | None]


def plan_exchange(matrices: Sequence[Matrix], rank: int, ranks: int) -> Plan:
    """What one rank sends and receives, the same plan on every rank seen from its own side.

    Args:
        matrices: of all operators of a stage, in the same order on every rank.
        rank: in the group that shares the shards.
        ranks: S.
    """
    edges = [column_edges(m.shape[1], ranks) for m in matrices]
    long = {own[-1]: own for own, m in zip(edges, matrices, strict=True) if not m.single}
    unit = max((b - a for own in long.values() for a, b in pairwise(own)), default=1)
    packed = {columns: packing(own, unit) for columns, own in long.items()}
    rows = [_rows(m, rank) for m in matrices]
    widths = [
        own.whole + own.cut if m.axis == 1 else edge[rank + 1] - edge[rank]
        for m, own, edge in zip(matrices, rows, edges, strict=True)
    ]
    planner = _Planner(matrices, edges, rank, ranks, unit)
    return Plan(unit, {name: planner.route(name) for name in ("P", "N")}, widths, rows, packed)


def _rows(matrix: Matrix, rank: int) -> Rows:
    (start, stop), columns = matrix.intervals[rank], matrix.shape[1]
    first, last = -(-start // columns), stop // columns
    return Rows(first, max(last - first, 0), last >= first and stop > last * columns)


# Peers of entries [entries], and what they belong to, see `Lane.local`.
_Entries = tuple[Tensor, Tensor]
_NOTHING = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


@dataclass
class _Planner:
    matrices: Sequence[Matrix]
    edges: list[list[int]]
    rank: int
    ranks: int
    unit: int

    def route(self, name: str) -> Route:
        return Route(self._side(name, self._owned), self._side(name, self._worked_on))

    def _side(self, name: str, entries: Callable[..., tuple[_Entries, _Entries]]) -> Side:
        """Lay the entries of all matrices out in one buffer, chunk after chunk."""
        own = [
            entries(matrix, matrix.sets[name], edges)
            for matrix, edges in zip(self.matrices, self.edges, strict=True)
        ]
        lanes = list(zip(*own, strict=True))
        peers = [torch.cat([peers for peers, _ in lane]) for lane in lanes]
        blocks, singles = (torch.bincount(of_lane, minlength=self.ranks) for of_lane in peers)
        sizes = (blocks + (singles + self.unit - 1) // self.unit) * self.unit
        begins = sizes.cumsum(0) - sizes
        built = [
            Lane(
                begin[of_lane] + _places_within(of_lane, counts),
                [len(peers) for peers, _ in lane],
                [local for _, local in lane],
            )
            for lane, of_lane, counts, begin in (
                (lanes[0], peers[0], blocks, begins // self.unit),
                (lanes[1], peers[1], singles, begins + blocks * self.unit),
            )
        ]
        return Side(sizes.tolist(), *built)

    def _owned(
        self, matrix: Matrix, indices: Tensor, edges: list[int]
    ) -> tuple[_Entries, _Entries]:
        """What this rank holds, as blocks and as single entries: workers, and where it lies."""
        start, stop = matrix.intervals[self.rank]
        columns, rows = matrix.shape[1], _rows(matrix, self.rank)
        if start == stop:
            return _NOTHING, _NOTHING
        if matrix.axis == 1:
            cut = [rows.first - 1] * (start % columns > 0) + [rows.first + rows.whole] * rows.cut
            first_entries = torch.tensor(cut, dtype=torch.int64).unsqueeze(1) * columns
            positions = first_entries + indices
            workers, blocks = matrix.owner(first_entries), _NOTHING
        else:
            near = indices[(indices >= start // columns) & (indices <= (stop - 1) // columns)]
            whole = matrix.whole(near)
            slices = torch.tensor(filled_slices(edges)).repeat(int(whole.sum()))
            blocks = slices, near[whole] - rows.first
            along = torch.arange(columns)
            positions = near[~whole].unsqueeze(1) * columns + along
            workers = torch.searchsorted(torch.tensor(edges), along, right=True) - 1
        held = (positions >= start) & (positions < stop)
        return blocks, (workers.expand_as(positions)[held], positions[held] - start)

    def _worked_on(
        self, matrix: Matrix, indices: Tensor, edges: list[int]
    ) -> tuple[_Entries, _Entries]:
        """What this rank computes with and what travels: owners, and which rows of the set."""
        columns = matrix.shape[1]
        if matrix.axis == 1:
            rows = _rows(matrix, self.rank)
            positions = indices + (rows.first + rows.whole) * columns
            positions = positions if rows.cut else positions[:0]
            return _NOTHING, (matrix.owner(positions), positions[:0])
        along = torch.arange(edges[self.rank], edges[self.rank + 1])
        if not len(along):
            return _NOTHING, _NOTHING
        whole = matrix.whole(indices)
        places = torch.arange(len(indices))
        positions = (indices[~whole].unsqueeze(1) * columns + along).flatten()
        return (
            (matrix.owner(indices[whole] * columns), places[whole]),
            (matrix.owner(positions), places[~whole]),
        )


def _places_within(peers: Tensor, counts: Tensor) -> Tensor:
    """For every entry, how many before it go to the same peer."""
    order = peers.argsort(stable=True)
    begins = (counts.cumsum(0) - counts)[peers[order]]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - begins
    return places
