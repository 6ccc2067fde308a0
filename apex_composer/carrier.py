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

from apex_composer.distributed import ShardRanks
from apex_composer.exchange import Lane, Matrix, Route, Side, plan_exchange


@dataclass(frozen=True, eq=False)
class Parts:
    """What belongs to the entries of one set that this rank holds.

    Attributes:
        blocks: [entries, unit], in the order of `Side.blocks`.
        singles: [entries], in the order of `Side.singles`.
        whole: by matrix, [whole rows, n] for the rows at axis 1 that never travel, else None.
    """

    blocks: Tensor
    singles: Tensor
    whole: list[Tensor | None]


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
        self._matrices, self._ranks = matrices, ranks
        self.plan = plan_exchange(matrices, ranks.rank, ranks.size)
        alike = groupby(range(len(matrices)), key=self._kind)
        self.families = [list(places) for _, places in alike]
        self._routes = {n: _on_device(route, device) for n, route in self.plan.routes.items()}
        self._sets = [{n: s.to(device) for n, s in m.sets.items()} for m in matrices]

    def _kind(self, place: int) -> tuple:
        matrix, rows = self._matrices[place], self.plan.rows[place]
        cut = None if rows is None else rows.cut
        return matrix.axis, matrix.single, len(matrix.sets["P"]), self.plan.widths[place], cut

    def take(self, name: str, shards: Sequence[Tensor]) -> Parts:
        """The entries of a set that this rank holds.

        Args:
            name: of the set, P or N.
            shards: by matrix, flat.
        """
        side, unit = self._routes[name].owners, self.plan.unit
        whole = [
            None if rows is None else self._whole(i, shards[i]).index_select(1, self._sets[i][name])
            for i, rows in enumerate(self.plan.rows)
        ]
        return Parts(
            _collect(side.blocks, shards, unit), _collect(side.singles, shards, 1).view(-1), whole
        )

    def add(self, name: str, parts: Parts, shards: Sequence[Tensor | None], sign: int = 1) -> None:
        """Add to the entries of a set that this rank holds, in place.

        Args:
            name: of the set, P or N.
            parts: as `take` and `to_owners` return them.
            shards: by matrix, flat; None passes the matrix over.
            sign: +1 or -1.
        """
        side, unit = self._routes[name].owners, self.plan.unit
        _spread(side.blocks, parts.blocks, shards, unit, sign)
        _spread(side.singles, parts.singles.view(-1, 1), shards, 1, sign)
        for i, part in enumerate(parts.whole):
            if part is not None and shards[i] is not None:
                whole = self._whole(i, shards[i])
                whole.index_add_(1, self._sets[i][name], part, alpha=sign)

    def square_sums(self, name: str, parts: Parts) -> Tensor:
        """By matrix, the sum of squares of what belongs to it, a vector; this rank's part."""
        side = self._routes[name].owners
        blocks = parts.blocks.split(side.blocks.parts)
        singles = parts.singles.split(side.singles.parts)
        return torch.stack(
            [
                sum(part.square().sum() for part in found if part is not None)
                for found in zip(blocks, singles, parts.whole, strict=True)
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
        buffer = self._send(route.owners, own.blocks, own.singles, route.workers)
        blocks, singles = self._read(route.workers, buffer)
        blocks = iter(blocks.split(self._sizes(route.workers.blocks)))
        singles = iter(singles.split(self._sizes(route.workers.singles)))
        families = []
        for family in self.families:
            i, block, single = family[0], next(blocks), next(singles)
            shape = (len(family), len(self._sets[i][name]), -1)
            if self.plan.widths[i] == 0:
                families.append(block.new_empty(*shape[:2], 0))
            elif self.plan.rows[i] is None:
                families.append((single if self._matrices[i].single else block).view(shape))
            else:
                whole = torch.stack([own.whole[place].t() for place in family])
                cut = self.plan.rows[i].cut
                families.append(torch.cat([whole, single.view(shape)], 2) if cut else whole)
        return families

    def to_owners(self, name: str, families: Sequence[Tensor]) -> Parts:
        """Results for the entries of a set, from their workers to who holds them (collective).

        Args:
            name: of the set, P or N.
            families: as `to_workers` returns them.
        """
        route = self._routes[name]
        blocks, singles, whole = [], [], [None] * len(self._matrices)
        for family, results in zip(self.families, families, strict=True):
            rows = self.plan.rows[family[0]]
            if rows is not None:
                for place, result in zip(family, results, strict=True):
                    whole[place] = result[:, : rows.whole].t()
                singles.append(results[:, :, rows.whole :].reshape(-1))
            else:
                lane = singles if self._matrices[family[0]].single else blocks
                lane.append(results.reshape(-1))
        empty = families[0].new_empty(0)
        packed = torch.cat([*blocks, empty]).view(-1, self.plan.unit)
        buffer = self._send(route.workers, packed, torch.cat([*singles, empty]), route.owners)
        own_blocks, own_singles = self._read(route.owners, buffer)
        return Parts(own_blocks, own_singles, whole)

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


def _collect(lane: Lane, shards: Sequence[Tensor], unit: int) -> Tensor:
    """[entries, unit] out of the shards, matrix by matrix."""
    found = [
        shard.view(-1, unit).index_select(0, local)
        for shard, local, part in zip(shards, lane.local, lane.parts, strict=True)
        if part
    ]
    return torch.cat([shards[0].new_empty(0, unit), *found])


def _spread(
    lane: Lane, entries: Tensor, shards: Sequence[Tensor | None], unit: int, sign: int
) -> None:
    """Add [entries, unit] to the shards, matrix by matrix."""
    for shard, local, part in zip(shards, lane.local, entries.split(lane.parts), strict=True):
        if shard is not None and len(part):
            shard.view(-1, unit).index_add_(0, local, part, alpha=sign)


def _on_device(route: Route, device: torch.device) -> Route:
    """The same route with its indices where the shards lie, so that no step waits for them."""

    def lane(own: Lane) -> Lane:
        return Lane(own.positions.to(device), own.parts, [t.to(device) for t in own.local])

    def side(own: Side) -> Side:
        return replace(own, blocks=lane(own.blocks), singles=lane(own.singles))

    return Route(side(route.owners), side(route.workers))
