"""Moves entries of sharded weights between their owners and their workers, by a plan.

Shape legend
    m   matrices of a family: computed in one go    n   indices of a set
    d   the part of a matrix's free axis that this rank works on
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from apex_composer.sharding.ranks import ShardRanks
from apex_composer.sharding.routes import Lane, Matrix, Route, Side, plan_exchange


@dataclass(frozen=True, eq=False)
class Parts:
    """What belongs to the entries of one set that this rank holds.

    Attributes:
        rows: by matrix, of the rows that this rank holds whole: the selected ones [rows, columns]
            at axis 0, the selected entries of all [rows, n] at axis 1.
        singles: [entries] of cut rows and biases, in the order of `Side.singles`.
    """

    rows: list[Tensor]
    singles: Tensor


class Carrier:
    """One rank's end of all exchanges of a stage.

    Tensors are given by matrix as this rank's flat shards of them: the weights, or the gradients.

    Args:
        matrices: of all operators, the same on every rank; those of one kind and size one
            behind the other, so that families are large.
        ranks: who shares the matrices.
        device: of the shards.

    Attributes:
        plan: of the exchanges.
        families: places of consecutive matrices that this rank works on in one go, because its
            shares of them have one shape [n, d].
    """

    def __init__(self, matrices: Sequence[Matrix], ranks: ShardRanks, device: torch.device):
        self._matrices, self._ranks, self._device = matrices, ranks, device
        self.plan = plan_exchange(matrices, ranks.rank, ranks.size)
        alike = groupby(range(len(matrices)), key=self._kind)
        self.families = [list(places) for _, places in alike]
        self._routes = {n: _on_device(route, device) for n, route in self.plan.routes.items()}
        self._columns = [
            {n: s.to(device) for n, s in m.sets.items()} if m.axis == 1 else {} for m in matrices
        ]
        self._places = {n: [self._arriving(n, f) for f in self.families] for n in self._routes}
        self._packing = {
            columns: maps and tuple(places.to(device) for places in maps)
            for columns, maps in self.plan.packing.items()
        }

    def _kind(self, place: int) -> tuple:
        matrix, rows = self._matrices[place], self.plan.rows[place]
        cut = rows.cut and matrix.axis == 1
        return matrix.axis, matrix.single, len(matrix.sets["P"]), self.plan.widths[place], cut

    def _arriving(self, name: str, family: Sequence[int]) -> Tensor | None:
        """Where in a family's rows those belong that arrive, [m * n]; None: in order."""
        side = self.plan.routes[name].workers
        size = len(self._matrices[family[0]].sets[name])
        places = torch.cat(
            [
                place * size + lane.local[i]
                for lane in (side.blocks, side.singles)
                for place, i in enumerate(family)
            ]
        )
        in_order = bool((places.diff() > 0).all())
        return None if in_order else places.to(self._device)

    def take(self, name: str, shards: Sequence[Tensor]) -> Parts:
        """The entries of a set that this rank holds.

        Args:
            name: of the set, P or N.
            shards: by matrix, flat.
        """
        rows = [
            self._whole(i, shard).index_select(matrix.axis, self._selected(name, i))
            for i, (matrix, shard) in enumerate(zip(self._matrices, shards, strict=True))
        ]
        return Parts(rows, _collect(self._routes[name].owners.singles, shards))

    def add(self, name: str, parts: Parts, shards: Sequence[Tensor | None], sign: int = 1) -> None:
        """Add to the entries of a set that this rank holds, in place.

        Args:
            name: of the set, P or N.
            parts: as `take` and `to_owners` return them.
            shards: by matrix, flat; None passes the matrix over.
            sign: +1 or -1.
        """
        _spread(self._routes[name].owners.singles, parts.singles, shards, sign)
        for i, (part, shard) in enumerate(zip(parts.rows, shards, strict=True)):
            if shard is not None:
                whole, axis = self._whole(i, shard), self._matrices[i].axis
                whole.index_add_(axis, self._selected(name, i), part, alpha=sign)

    def square_sums(self, name: str, parts: Parts) -> Tensor:
        """By matrix, the sum of squares of what belongs to it, a vector; this rank's part."""
        singles = parts.singles.split(self._routes[name].owners.singles.parts)
        return torch.stack(
            [
                rows.square().sum() + single.square().sum()
                for rows, single in zip(parts.rows, singles, strict=True)
            ]
        )

    def to_workers(self, name: str, shards: Sequence[Tensor]) -> list[Tensor]:
        """The entries of a set, from who holds them to who works on them (collective).

        Args:
            name: of the set, P or N.
            shards: by matrix, flat.

        Returns:
            By family, [m, n, d]: W[P] or G[N], columns as rows at axis 1.
        """
        route, own = self._routes[name], self.take(name, shards)
        buffer = self._send(route.owners, self._pack(own.rows), own.singles, route.workers)
        blocks, singles = self._read(route.workers, buffer)
        families = []
        for family, places, block, single in zip(
            self.families,
            self._places[name],
            blocks.split(self._sizes(route.workers.blocks)),
            singles.split(self._sizes(route.workers.singles)),
            strict=True,
        ):
            i, width = family[0], self.plan.widths[family[0]]
            shape = (len(family), len(self._matrices[i].sets[name]), -1)
            if width == 0:
                families.append(block.new_empty(*shape[:2], 0))
            elif self._matrices[i].axis == 1:
                whole = torch.stack([own.rows[place].t() for place in family])
                cut = self.plan.rows[i].cut
                families.append(torch.cat([whole, single.view(shape)], 2) if cut else whole)
            else:
                rows = torch.cat([block[:, :width], single.view(-1, width)])
                if places is not None:
                    rows = torch.empty_like(rows).index_copy_(0, places, rows)
                families.append(rows.view(shape))
        return families

    def to_owners(self, name: str, families: Sequence[Tensor]) -> Parts:
        """Results for the entries of a set, from their workers to who holds them (collective).

        Args:
            name: of the set, P or N.
            families: as `to_workers` returns them.
        """
        route, unit = self._routes[name], self.plan.unit
        blocks, singles, whole = [families[0].new_empty(0, unit)], [families[0].new_empty(0)], {}
        for family, places, results in zip(
            self.families, self._places[name], families, strict=True
        ):
            i, width = family[0], self.plan.widths[family[0]]
            if self._matrices[i].axis == 1:
                size = self.plan.rows[i].whole
                whole |= {p: r[:, :size].t() for p, r in zip(family, results, strict=True)}
                singles.append(results[:, :, size:].reshape(-1))
            elif width:
                rows = results.reshape(-1, width)
                rows = rows if places is None else rows.index_select(0, places)
                count = sum(route.workers.blocks.parts[place] for place in family)
                blocks.append(pad(rows[:count], (0, unit - width)))
                singles.append(rows[count:].reshape(-1))
        buffer = self._send(route.workers, torch.cat(blocks), torch.cat(singles), route.owners)
        own_blocks, own_singles = self._read(route.owners, buffer)
        rows = self._unpack(own_blocks, route.owners.blocks)
        return Parts([whole.get(i, part) for i, part in enumerate(rows)], own_singles)

    def _selected(self, name: str, place: int) -> Tensor:
        """Of the rows that this rank holds whole, the selected ones; at axis 1, their columns."""
        if self._matrices[place].axis == 1:
            return self._columns[place][name]
        return self._routes[name].owners.blocks.local[place]

    def _pack(self, rows: Sequence[Tensor]) -> Tensor:
        """The blocks [entries, unit] of selected rows, by matrix [rows, columns]."""
        blocks = [rows[0].new_empty(0, self.plan.unit)]
        for part, matrix in zip(rows, self._matrices, strict=True):
            if not matrix.single:
                maps = self._packing[matrix.shape[1]]
                part = part if maps is None else part.index_select(1, maps[0])
                blocks.append(part.view(-1, self.plan.unit))
        return torch.cat(blocks)

    def _unpack(self, blocks: Tensor, lane: Lane) -> list[Tensor]:
        """By matrix, the selected rows [rows, columns] that blocks are made of."""
        rows = []
        for part, local, matrix in zip(
            blocks.split(lane.parts), lane.local, self._matrices, strict=True
        ):
            maps = self._packing.get(matrix.shape[1])
            if not len(local):
                part = part.new_empty(0, matrix.shape[1])
            elif maps is None:
                part = part.reshape(len(local), -1)
            else:
                part = part.reshape(len(local), -1).index_select(1, maps[1])
            rows.append(part)
        return rows

    def _send(self, side: Side, blocks: Tensor, singles: Tensor, other: Side) -> Tensor:
        # Zeros: what pads a chunk travels too, and unwritten memory may hold anything.
        buffer = blocks.new_zeros(sum(side.sizes))
        buffer.view(-1, self.plan.unit).index_copy_(0, side.blocks.positions, blocks)
        buffer.index_copy_(0, side.singles.positions, singles)
        return self._ranks.exchange(buffer, side.sizes, other.sizes)

    def _read(self, side: Side, buffer: Tensor) -> tuple[Tensor, Tensor]:
        blocks = buffer.view(-1, self.plan.unit).index_select(0, side.blocks.positions)
        return blocks, buffer.index_select(0, side.singles.positions)

    def _sizes(self, lane: Lane) -> list[int]:
        return [sum(lane.parts[i] for i in family) for family in self.families]

    def _whole(self, place: int, shard: Tensor) -> Tensor:
        """The rows at axis 1 that this rank holds whole, a view [whole rows, columns]."""
        rows, matrix = self.plan.rows[place], self._matrices[place]
        columns = matrix.shape[1]
        begin = rows.first * columns - matrix.intervals[self._ranks.rank][0]
        # A shard inside a row holds no row: its first one would begin behind its end.
        begin = begin if rows.whole else 0
        return shard[begin : begin + rows.whole * columns].view(rows.whole, columns)


def _collect(lane: Lane, shards: Sequence[Tensor]) -> Tensor:
    """The single entries [entries] out of the shards, matrix by matrix."""
    found = [
        shard.index_select(0, local)
        for shard, local in zip(shards, lane.local, strict=True)
        if len(local)
    ]
    return torch.cat([shards[0].new_empty(0), *found])


def _spread(lane: Lane, entries: Tensor, shards: Sequence[Tensor | None], sign: int) -> None:
    """Add single entries [entries] to the shards, matrix by matrix."""
    for shard, local, part in zip(shards, lane.local, entries.split(lane.parts), strict=True):
        if shard is not None and len(part):
            shard.index_add_(0, local, part, alpha=sign)


def _on_device(route: Route, device: torch.device) -> Route:
    """The same route with its indices where the shards lie, so that no step waits for them."""

    def lane(own: Lane, local: list[Tensor]) -> Lane:
        return Lane(own.positions.to(device), own.parts, [t.to(device) for t in local])

    def side(own: Side, owners: bool) -> Side:
        blocks, singles = (
            lane(each, each.local if owners else []) for each in (own.blocks, own.singles)
        )
        return replace(own, blocks=blocks, singles=singles)

    return Route(side(route.owners, True), side(route.workers, False))
