"""Moves entries of sharded weights between their owners and their workers, by routes.

Shape legend
    m   matrices of a family: computed in one go    n   indices of a set
    d   the part of a matrix's free axis that this rank works on
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from apex_composer.sharding.ranks import ShardRanks
from apex_composer.sharding.routes import Lane, Matrix, Side, lay_routes


@dataclass(frozen=True, eq=False)
class Parts:
    """What belongs to the entries of one set that this rank holds.

    Attributes:
        rows: those that this rank holds whole, by matrix: the selected ones [rows, columns] at
            axis 0, the selected entries of all [rows, n] at axis 1.
        singles: [entries] of cut rows and biases, in the order of `Side.singles`.
    """

    rows: list[Tensor]
    singles: Tensor


class Transport:
    """One rank's end of all exchanges of a stage.

    Sets are named P and N. Tensors are given by matrix as this rank's flat shards of them: the
    weights, or the gradients.

    Args:
        matrices: weights and biases of all operators, the same on every rank; those of one kind
            and size one behind the other, so that families are large.
        ranks: those that share the matrices.
        device: the shards'.

    Attributes:
        families: places of consecutive matrices that this rank works on in one go, because its
            shares of them have one shape [n, d].
    """

    def __init__(self, matrices: Sequence[Matrix], ranks: ShardRanks, device: torch.device):
        self._matrices, self._ranks = matrices, ranks
        self._routes = lay_routes(matrices, ranks.rank, ranks.size, device)
        self._block = self._routes.block
        alike = groupby(range(len(matrices)), key=self._kind)
        self.families = [list(places) for _, places in alike]
        self._selected, self._order = {}, {}
        for name, route in self._routes.of.items():
            self._selected[name] = [
                matrix.sets[name].to(device) if matrix.axis == 1 else rows
                for matrix, rows in zip(matrices, route.owners.blocks.local, strict=True)
            ]
            self._order[name] = [self._arriving(route.workers, f) for f in self.families]

    def _kind(self, place: int) -> tuple:
        matrix, rows = self._matrices[place], self._routes.rows[place]
        cut = rows.cut and matrix.axis == 1
        return matrix.axis, matrix.single, len(matrix.sets["P"]), self._routes.widths[place], cut

    def _arriving(self, workers: Side, family: Sequence[int]) -> Tensor | None:
        """Where in a family's rows those belong that arrive, [m * n]; None: in order."""
        size = len(self._matrices[family[0]].sets["P"])
        order = torch.cat(
            [
                place * size + lane.local[i]
                for lane in (workers.blocks, workers.singles)
                for place, i in enumerate(family)
            ]
        )
        return order if (order.diff() < 0).any() else None

    def take(self, name: str, shards: Sequence[Tensor]) -> Parts:
        """The entries of a set that this rank holds."""
        rows = [
            self._whole(i, shard).index_select(self._matrices[i].axis, self._selected[name][i])
            for i, shard in enumerate(shards)
        ]
        lane = self._routes.of[name].owners.singles
        singles = [
            shard.index_select(0, local)
            for shard, local in zip(shards, lane.local, strict=True)
            if len(local)
        ]
        return Parts(rows, torch.cat([shards[0][:0], *singles]))

    def add(self, name: str, parts: Parts, shards: Sequence[Tensor | None], sign: int = 1) -> None:
        """Add to the entries of a set that this rank holds, in place; not where a shard is None."""
        lane = self._routes.of[name].owners.singles
        singles = parts.singles.split(lane.parts)
        for i, (shard, rows, entries) in enumerate(zip(shards, parts.rows, singles, strict=True)):
            if shard is not None:
                axis, selected = self._matrices[i].axis, self._selected[name][i]
                self._whole(i, shard).index_add_(axis, selected, rows, alpha=sign)
                if len(entries):
                    shard.index_add_(0, lane.local[i], entries, alpha=sign)

    def square_sums(self, name: str, parts: Parts) -> Tensor:
        """By matrix, the sum of squares of what belongs to it, a vector; this rank's part."""
        singles = parts.singles.split(self._routes.of[name].owners.singles.parts)
        return torch.stack(
            [
                rows.square().sum() + single.square().sum()
                for rows, single in zip(parts.rows, singles, strict=True)
            ]
        )

    def to_workers(self, name: str, shards: Sequence[Tensor]) -> list[Tensor]:
        """The entries of a set, from who holds them to who works on them (collective).

        Returns:
            By family, [m, n, d]: W[P] or G[N], columns as rows at axis 1.
        """
        route, own = self._routes.of[name], self.take(name, shards)
        selected = zip(self._matrices, own.rows, strict=True)
        blocks = [self._in_blocks(rows) for matrix, rows in selected if matrix.axis == 0]
        blocks, singles = self._send(route.owners, blocks, [own.singles], route.workers)
        families = []
        for family, order, block, single in zip(
            self.families,
            self._order[name],
            blocks.split(self._sizes(route.workers.blocks)),
            singles.split(self._sizes(route.workers.singles)),
            strict=True,
        ):
            matrix, width = self._matrices[family[0]], self._routes.widths[family[0]]
            shape = len(family), len(matrix.sets[name])
            if matrix.axis == 1:
                whole = torch.stack([own.rows[i].t() for i in family])
                cut = single.view(*shape, width - whole.shape[2])
                families.append(torch.cat([whole, cut], 2) if len(single) else whole)
            else:
                rows = torch.cat([block[:, :width], single.view(-1, max(width, 1))[:, :width]])
                if order is not None:
                    rows = torch.empty_like(rows).index_copy_(0, order, rows)
                families.append(rows.view(*shape, width))
        return families

    def to_owners(self, name: str, families: Sequence[Tensor]) -> Parts:
        """Results for what `to_workers` gave, from their workers to who holds them (collective)."""
        route, blocks, singles, whole = self._routes.of[name], [], [], {}
        for family, order, results in zip(self.families, self._order[name], families, strict=True):
            if self._matrices[family[0]].axis == 1:
                size = self._routes.rows[family[0]].whole
                whole |= {i: own[:, :size].t() for i, own in zip(family, results, strict=True)}
                singles.append(results[:, :, size:].flatten())
            else:
                rows = results.flatten(0, 1)
                rows = rows if order is None else rows.index_select(0, order)
                count = sum(route.workers.blocks.parts[i] for i in family)
                blocks.append(self._in_blocks(rows[:count]))
                singles.append(rows[count:].flatten())
        blocks, singles = self._send(route.workers, blocks, singles, route.owners)
        parts = blocks.split(route.owners.blocks.parts)
        rows = [
            whole[i] if i in whole else self._in_rows(part, self._matrices[i].shape[1])
            for i, part in enumerate(parts)
        ]
        return Parts(rows, singles)

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """Rows, or slices of them, as blocks: [rows, columns] -> [blocks, block]."""
        missing = -rows.shape[1] % self._block
        return (pad(rows, (0, missing)) if missing else rows).view(-1, self._block)

    def _in_rows(self, blocks: Tensor, columns: int) -> Tensor:
        """Blocks as the rows that they were: [blocks, block] -> [rows, columns]."""
        return blocks.view(-1, columns + -columns % self._block)[:, :columns]

    def _send(
        self, own: Side, blocks: Sequence[Tensor], singles: Sequence[Tensor], other: Side
    ) -> tuple[Tensor, Tensor]:
        """From one side of a route to the other; what has arrived there, in the lanes' order."""
        # Zeros: what pads a chunk travels too, and unwritten memory may hold anything.
        buffer = singles[0].new_zeros(sum(own.sizes))
        if blocks:
            buffer.view(-1, self._block).index_copy_(0, own.blocks.positions, torch.cat(blocks))
        buffer.index_copy_(0, own.singles.positions, torch.cat(singles))
        buffer = self._ranks.exchange(buffer, own.sizes, other.sizes)
        blocks = buffer.view(-1, self._block).index_select(0, other.blocks.positions)
        return blocks, buffer.index_select(0, other.singles.positions)

    def _sizes(self, lane: Lane) -> list[int]:
        return [sum(lane.parts[i] for i in family) for family in self.families]

    def _whole(self, place: int, shard: Tensor) -> Tensor:
        """The rows that this rank holds whole, a view [whole rows, columns]."""
        rows, matrix = self._routes.rows[place], self._matrices[place]
        columns = matrix.shape[1]
        begin = rows.first * columns - matrix.intervals[self._ranks.rank][0]
        return shard[begin : begin + rows.whole * columns].view(rows.whole, columns)
