"""How the Monarch kernels reach selected rows of many matrices; legend in monarch_kernels.py."""

import triton
import triton.language as tl


@triton.jit
def float_pointer(table, place, ALIGNED: tl.constexpr):
    """One float32 tensor of a table of addresses."""
    pointer = tl.load(table + place).to(tl.pointer_type(tl.float32))
    # Addresses from a table say nothing about their alignment, and without it no load is a vector.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def index_pointer(table, place, ALIGNED: tl.constexpr):
    """One int64 tensor of a table of addresses."""
    pointer = tl.load(table + place).to(tl.pointer_type(tl.int64))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def gather(matrix, index, present, columns, width, row_stride, column_stride):
    """Rows `index` of a matrix at `columns`, [rows, columns], zero where not present."""
    places = index[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    mask = present[:, None] & (columns < width)[None, :]
    return tl.load(matrix + places, mask=mask, other=0.0)


@triton.jit
def scratch_rows(scratch, rows, present, columns, width, scratch_stride):
    """Rows of scratch memory at `columns`, [rows, columns], zero where not present."""
    places = rows[:, None] * scratch_stride + columns[None, :]
    mask = present[:, None] & (columns < width)[None, :]
    return tl.load(scratch + places, mask=mask, other=0.0)


@triton.jit
def scatter_add(matrix, tile, index, present, columns, width, row_stride, column_stride):
    """Add a [rows, columns] tile to rows `index`, which are distinct, of a matrix."""
    places = index[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    mask = present[:, None] & (columns < width)[None, :]
    current = tl.load(matrix + places, mask=mask, other=0.0)
    tl.store(matrix + places, current + tile, mask=mask)


@triton.jit
def _transposed_places(
    indices, row, rows, column, width, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Places of the rows `indices[row:rows]` and a mask, flat, rows running faster than columns.

    Flat, because nothing but the order of a one-dimensional tensor tells every version of triton
    that neighbouring threads shall take neighbouring rows, where the indices come from memory.
    """
    line = tl.arange(0, ROWS * COLUMNS)
    chosen, columns = row + line % ROWS, column + line // ROWS
    index = tl.load(indices + chosen, mask=chosen < rows, other=0)
    places = index * row_stride + columns.to(tl.int64) * column_stride
    return places, (chosen < rows) & (columns < width)


@triton.jit
def gather_transposed(
    matrix, indices, row, rows, column, width, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows `indices[row:rows]` of a matrix, [ROWS, COLUMNS], read along the rows."""
    places, mask = _transposed_places(
        indices, row, rows, column, width, row_stride, column_stride, ROWS, COLUMNS
    )
    values = tl.load(matrix + places, mask=mask, other=0.0)
    return tl.trans(tl.reshape(values, (COLUMNS, ROWS)))


@triton.jit
def scatter_add_transposed(
    matrix, tile, indices, row, rows, column, width, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add a [ROWS, COLUMNS] tile to rows `indices[row:rows]`, distinct, along the rows."""
    places, mask = _transposed_places(
        indices, row, rows, column, width, row_stride, column_stride, ROWS, COLUMNS
    )
    current = tl.load(matrix + places, mask=mask, other=0.0)
    values = tl.reshape(tl.trans(tile), (COLUMNS * ROWS,))
    tl.store(matrix + places, current + values, mask=mask)


@triton.jit
def block_of(factor, block, rows, columns, SIZE: tl.constexpr, FLIPPED: tl.constexpr):
    """Entries of one SIZE x SIZE block of a factor (FLIPPED: of its transpose), zero outside."""
    if FLIPPED:
        places = columns[None, :] * SIZE + rows[:, None]
    else:
        places = rows[:, None] * SIZE + columns[None, :]
    mask = (rows < SIZE)[:, None] & (columns < SIZE)[None, :]
    return tl.load(factor + block * (SIZE * SIZE) + places, mask=mask, other=0.0)
