"""Launches of the Monarch kernels for a run of matrices of one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apex_composer.triton_kernels import monarch_kernels as kernels
from apex_composer.triton_kernels import tiles


class Layout(NamedTuple):
    """Where the entries of V, a matrix seen with its expanded axis first, lie in memory.

    Attributes:
        width: the columns of V.
        row_stride: from one row of V to the next.
        column_stride: from one column of V to the next.
        scratch_stride: from one row of an [n, width] intermediate result to the next.
        transposed: neighbours in memory are rows of V rather than columns.
    """

    width: int
    row_stride: int
    column_stride: int
    scratch_stride: int
    transposed: bool

    @classmethod
    def of(cls, weight: Tensor, axis: int) -> "Layout":
        """The layout of a weight [rows, columns] whose `axis` is expanded."""
        view = weight if axis == 0 else weight.t()
        width, (row_stride, column_stride) = view.shape[1], view.stride()
        if width == 1:
            column_stride = 1
        # Rows of the scratch memory begin at multiples of 64 bytes, whatever the width.
        scratch_stride = tiles.divide_up(width, 16) * 16
        return cls(width, row_stride, column_stride, scratch_stride, row_stride < column_stride)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The four numbers as every kernel takes them."""
        return self[:4]


class AddressTable:
    """The addresses of a list of tensors, on their device.

    Args:
        device: of the tensors.

    Attributes:
        table: [tensors], int64; None before the first `update`.
        aligned: whether every address is a multiple of 16 bytes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._addresses: list[int] = []
        self.table: Tensor | None = None
        self.aligned = False

    def has_moved(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any tensor lies elsewhere than at the last `update`."""
        return [tensor.data_ptr() for tensor in tensors] != self._addresses

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Look where the tensors lie now, and write the table again if any has moved.

        Args:
            tensors: in the order of the table. The caller keeps them alive.
        """
        if not self.has_moved(tensors):
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        on_cuda = self._device.type == "cuda"
        # From pinned memory the copy takes its turn in the stream and the host does not wait. The
        # pinned memory is new each time: torch reuses it only after the copy has been done.
        table = torch.tensor(addresses, dtype=torch.int64, pin_memory=on_cuda)
        self.table = table.to(self._device, non_blocking=True)
        self.aligned = all(address % 16 == 0 for address in addresses)
        self._addresses = addresses


class Tables(NamedTuple):
    """The addresses of everything that a batch reads and writes."""

    weights: AddressTable
    lefts: AddressTable
    rights: AddressTable
    advantageous: AddressTable
    disadvantageous: AddressTable
    gradients: AddressTable

    def aligned(self, *, gradients: bool) -> bool:
        """Whether all addresses are multiples of 16 bytes, with or without the gradients'."""
        return all(table.aligned for table in self[: None if gradients else -1])


class Launcher(NamedTuple):
    """The kernels of one batch; every method takes the first matrix and their number.

    Attributes:
        tables: of the batch.
        layout: of its weights and gradients.
        p: as in the factors.
        q: as in the factors.
        precision: of the products.
    """

    tables: Tables
    layout: Layout
    p: int
    q: int
    precision: str

    @property
    def scratch_parts(self) -> int:
        """How many [n, width] intermediate results a matrix needs at most."""
        return 2 if self.layout.transposed else 1

    @property
    def scratch_size(self) -> int:
        """Entries of one [n, width] intermediate result."""
        return self.p * self.q * self.layout.scratch_stride

    def right_product(self, scratch: Tensor, first: int, count: int) -> None:
        """Z = R W[P] into scratch."""
        tile = tiles.product_tiles(self.q, self.layout.width)
        kernels.right_product_kernel[self._grid(tile.columns, self.p, count)](
            self.tables.weights.table, self.tables.rights.table, self.tables.advantageous.table,
            scratch, first, *self.layout.sizes, self.p, self.q, tile.rows, tile.step, tile.columns,
            self.layout.transposed, self.tables.aligned(gradients=False), self.precision,
            num_warps=tile.warps,
        )  # fmt: skip

    def left_product(self, scratch: Tensor, sign: float, first: int, count: int) -> None:
        """W[N] += sign * L Z from Z in scratch, which is lost."""
        tables, layout = self.tables, self.layout
        aligned = tables.aligned(gradients=False)
        tile = tiles.product_tiles(self.p, layout.width)
        kernels.left_product_kernel[self._grid(tile.columns, self.q, count)](
            tables.weights.table, tables.lefts.table, tables.disadvantageous.table, scratch, sign,
            first, *layout.sizes, self.p, self.q, tile.rows, tile.step, tile.columns,
            layout.transposed, aligned, self.precision, num_warps=tile.warps,
        )  # fmt: skip
        if layout.transposed:
            kernels.add_transposed_kernel[self._transposing_grid(count)](
                tables.weights.table, tables.disadvantageous.table, scratch, sign, first,
                *layout.sizes, self.p * self.q, tiles.TRANSPOSE_ROWS, tiles.TRANSPOSE_COLUMNS,
                aligned,
            )  # fmt: skip

    def backward(self, scratch: Tensor, results: Tensor, first: int, count: int) -> None:
        """G[P] += T^T G[N], and dL and dR, from Z in scratch[0], which is lost.

        Args:
            scratch: [scratch_parts, ...].
            results: [count, left_size + right_size], of these matrices.
            first: matrix.
            count: of matrices.
        """
        splits = self._splits(count)
        partials = results
        if splits > 1:
            partials = torch.empty(
                count, splits, results.shape[1], dtype=torch.float32, device=results.device
            )
        if self.layout.transposed:
            self._take_transposed(scratch[1], first, count)
        self._left_backward(scratch, partials, splits, first, count)
        self._right_backward(scratch, partials, splits, first, count)
        if splits > 1:
            grid = (tiles.divide_up(results.shape[1], tiles.SUM_BLOCK), count)
            kernels.sum_splits_kernel[grid](
                partials, results, splits, results.shape[1], tiles.SUM_BLOCK
            )

    @property
    def left_size(self) -> int:
        """Entries of a matrix's results before dR: dL, padded so that dR is aligned."""
        return tiles.divide_up(self.q * self.p * self.p, 4) * 4

    @property
    def result_size(self) -> int:
        """Entries of a matrix's results: dL and dR, each padded."""
        return self.left_size + tiles.divide_up(self.p * self.q * self.q, 4) * 4

    def _take_transposed(self, received: Tensor, first: int, count: int) -> None:
        kernels.take_transposed_kernel[self._transposing_grid(count)](
            self.tables.gradients.table, self.tables.disadvantageous.table, received, first,
            *self.layout.sizes, self.p * self.q, tiles.TRANSPOSE_ROWS, tiles.TRANSPOSE_COLUMNS,
            self.tables.aligned(gradients=True),
        )  # fmt: skip

    def _left_backward(
        self, scratch: Tensor, partials: Tensor, splits: int, first: int, count: int
    ) -> None:
        tables, layout = self.tables, self.layout
        tile = tiles.left_backward_tiles(self.p, layout.width)
        kernels.left_backward_kernel[(splits, self.q, count)](
            tables.gradients.table, tables.lefts.table, tables.disadvantageous.table, scratch[0],
            scratch[-1], partials, first, *layout.sizes, self.result_size,
            tile.turns(layout.width, splits), splits, self.p, self.q, tile.rows, tile.step,
            tile.columns, layout.transposed, tables.aligned(gradients=True), self.precision,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip

    def _right_backward(
        self, scratch: Tensor, partials: Tensor, splits: int, first: int, count: int
    ) -> None:
        tables, layout = self.tables, self.layout
        tile = tiles.right_backward_tiles(self.q, layout.width)
        kernels.right_backward_kernel[(splits, self.p, count)](
            tables.weights.table, tables.gradients.table, tables.rights.table,
            tables.advantageous.table, scratch[0], partials.view(-1)[self.left_size :], first,
            *layout.sizes, self.result_size, tile.turns(layout.width, splits), splits, self.p,
            self.q, tile.rows, tile.step, tile.columns, layout.transposed,
            tables.aligned(gradients=True), self.precision, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip

    def _splits(self, count: int) -> int:
        width = self.layout.width
        left = tiles.left_backward_tiles(self.p, width).turns(width, 1)
        right = tiles.right_backward_tiles(self.q, width).turns(width, 1)
        return tiles.split_count(count * min(self.p, self.q), min(left, right))

    def _grid(self, columns: int, blocks: int, count: int) -> tuple[int, int, int]:
        return tiles.divide_up(self.layout.width, columns), blocks, count

    def _transposing_grid(self, count: int) -> tuple[int, int, int]:
        blocks = tiles.divide_up(self.p * self.q, tiles.TRANSPOSE_ROWS)
        return self._grid(tiles.TRANSPOSE_COLUMNS, blocks, count)
