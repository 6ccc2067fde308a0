"""Who sends which entries of sharded weights to whom. Pure: no communication, no weights.

An operator mixes the n selected rows of a weight, column by column (axis 0; axis 1 is the
transpose), so the free axis can be divided between the ranks: the *worker* of an entry is the
rank that computes with its column, the *owner* the one that holds it.

    axis 0   rank s works on the s-th slice of the columns, for all n rows
    axis 1   the rank that holds the first entry of a row works on that row, which then lies
             whole on it unless FSDP1 cut it: only the selected entries of cut rows travel

A route moves the entries of one set of indices (P or N) of all matrices in one buffer, cut into
one chunk per peer. Both ends list a chunk's entries in the same order: matrix by matrix, then by
index, then along the free axis. A chunk holds first blocks of `unit` consecutive entries (rows
cut at column slices), then single entries (biases, cut rows) and padding to the next unit.

Shape legend
    n   indices of a set            S   ranks that share the shards
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor

# More slices per rank than this even out what does not divide; fewer make longer blocks.
_SLICES_PER_RANK = 8


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

    def owner(self, positions: Tensor) -> Tensor:
        """The rank that holds each flat position, same shape."""
        held = sorted(
            (start, rank) for rank, (start, stop) in enumerate(self.intervals) if stop > start
        )
        starts, ranks = (torch.tensor(column) for column in zip(*held, strict=True))
        return ranks[torch.searchsorted(starts, positions, right=True) - 1]


@dataclass(frozen=True)
class Rows:
    """Rows that one rank works on at axis 1: `whole` ones from `first`, then perhaps a cut one.

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
        local: owners only: by matrix, where each entry lies in the shard, in the lane's unit.
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
        unit: numbers in a block.
        routes: {"P": Route, "N": Route}.
        widths: by matrix, the length of the free axis that this rank works on.
        rows: by matrix, the rows behind it at axis 1; None at axis 0.
    """

    unit: int
    routes: dict[str, Route]
    widths: list[int]
    rows: list[Rows | None]


def column_edges(columns: int, ranks: int, grain: int) -> list[int]:
    """Where the columns are cut into one slice per rank: `ranks + 1` ascending numbers.

    Args:
        columns: of the matrix.
        ranks: S.
        grain: every shard ends at a multiple of it within its row; a divisor of `columns`.
    """
    if columns % ranks == 0:
        unit = gcd(grain, columns // ranks)
    else:
        most = max(1, columns // (_SLICES_PER_RANK * ranks))
        unit = next(u for u in range(min(most, grain), 0, -1) if grain % u == 0)
    return [rank * (columns // unit) // ranks * unit for rank in range(ranks + 1)]


def plan_exchange(matrices: Sequence[Matrix], rank: int, ranks: int) -> Plan:
    """What one rank sends and receives, the same plan on every rank seen from its own side.

    Args:
        matrices: of all operators of a stage, in the same order on every rank.
        rank: in the group that shares the shards.
        ranks: S.
    """
    edges = [column_edges(m.shape[1], ranks, _grain(m)) for m in matrices]
    long = [place for place, matrix in enumerate(matrices) if not matrix.single]
    unit = gcd(*(edge for i in long for edge in edges[i]), *(_grain(matrices[i]) for i in long))
    rows = [_rows(m, rank) if m.axis == 1 else None for m in matrices]
    widths = [
        own.whole + own.cut if own is not None else edge[rank + 1] - edge[rank]
        for own, edge in zip(rows, edges, strict=True)
    ]
    planner = _Planner(matrices, edges, rank, ranks, unit or 1)
    return Plan(unit or 1, {name: planner.route(name) for name in ("P", "N")}, widths, rows)


def _grain(matrix: Matrix) -> int:
    return gcd(matrix.shape[1], *(edge for interval in matrix.intervals for edge in interval))


def _rows(matrix: Matrix, rank: int) -> Rows:
    (start, stop), columns = matrix.intervals[rank], matrix.shape[1]
    first, last = -(-start // columns), stop // columns
    return Rows(first, max(last - first, 0), last >= first and stop > last * columns)


@dataclass
class _Planner:
    matrices: Sequence[Matrix]
    edges: list[list[int]]
    rank: int
    ranks: int
    unit: int

    def route(self, name: str) -> Route:
        return Route(self._side(name, self._owned), self._side(name, self._worked_on))

    def _side(self, name: str, entries: Callable[..., tuple[Tensor, Tensor]]) -> Side:
        """Lay the entries of all matrices out in one buffer, chunk after chunk."""
        lanes = []
        for single, unit in ((False, self.unit), (True, 1)):
            own = [
                entries(m, m.sets[name], self.edges[i], unit)
                if m.single == single
                else (torch.zeros(0, dtype=torch.int64),) * 2
                for i, m in enumerate(self.matrices)
            ]
            peers = torch.cat([peers for peers, _ in own])
            lanes.append((peers, torch.bincount(peers, minlength=self.ranks), own))
        (_, blocks, _), (_, singles, _) = lanes
        sizes = (blocks + (singles + self.unit - 1) // self.unit) * self.unit
        begins = sizes.cumsum(0) - sizes
        built = []
        for (peers, counts, own), begin in zip(
            lanes, (begins // self.unit, begins + blocks * self.unit), strict=True
        ):
            positions = begin[peers] + _places_within(peers, counts)
            parts = [len(peers) for peers, _ in own]
            built.append(Lane(positions, parts, [local for _, local in own]))
        return Side(sizes.tolist(), *built)

    def _owned(
        self, matrix: Matrix, indices: Tensor, edges: list[int], unit: int
    ) -> tuple[Tensor, Tensor]:
        """Entries that this rank holds: their workers, and where they lie in its shard."""
        start, stop = matrix.intervals[self.rank]
        columns = matrix.shape[1]
        if start == stop:
            return (torch.zeros(0, dtype=torch.int64),) * 2
        if matrix.axis == 1:
            rows = _rows(matrix, self.rank)
            cut = [rows.first - 1] * (start % columns > 0) + [rows.first + rows.whole] * rows.cut
            first_entries = torch.tensor(cut, dtype=torch.int64).unsqueeze(1) * columns
            positions = first_entries + indices
            workers = matrix.owner(first_entries).expand_as(positions)
        else:
            near = (indices >= start // columns) & (indices <= (stop - 1) // columns)
            along = torch.arange(0, columns, unit)
            positions = indices[near].unsqueeze(1) * columns + along
            workers = torch.searchsorted(torch.tensor(edges), along, right=True) - 1
            workers = workers.expand_as(positions)
        held = (positions >= start) & (positions < stop)
        return workers[held], (positions[held] - start) // unit

    def _worked_on(
        self, matrix: Matrix, indices: Tensor, edges: list[int], unit: int
    ) -> tuple[Tensor, Tensor]:
        """Entries that this rank computes with and that travel: their owners."""
        if matrix.axis == 1:
            rows = _rows(matrix, self.rank)
            positions = indices + (rows.first + rows.whole) * matrix.shape[1]
            positions = positions if rows.cut else positions[:0]
        else:
            along = torch.arange(edges[self.rank], edges[self.rank + 1], unit)
            positions = (indices.unsqueeze(1) * matrix.shape[1] + along).flatten()
        return matrix.owner(positions), positions[:0]


def _places_within(peers: Tensor, counts: Tensor) -> Tensor:
    """For every entry, how many before it go to the same peer."""
    order = peers.argsort(stable=True)
    begins = (counts.cumsum(0) - counts)[peers[order]]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - begins
    return places
