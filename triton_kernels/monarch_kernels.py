"""The device code of Monarch fold and gradient map; `monarch.py` launches it, README.md derives it.

Shape legend, of each matrix of a batch
    V, G      the weight or the gradient seen with its expanded axis first: rows x width
    P, N [n]  rows of the advantageous and of the disadvantageous units, n = p * q
    L [q, p, p], R [p, q, q]
    X [n, width] = V[P];  row i * q + j of an [n, width] matrix belongs to block i of R and j of L
    Z = R X, kept in scratch memory [matrices, n, scratch_stride]

Grid of every kernel: (tiles of the width, blocks, matrices). `first` is the first matrix's place in
the tables of addresses. TRANSPOSED: the expanded axis is the contiguous one, so tiles are read and
written with neighbouring threads along it.
"""

import triton
import triton.language as tl

from apex_composer.triton_kernels.monarch_access import (
    block_of,
    float_pointer,
    gather,
    gather_transposed,
    index_pointer,
    scatter_add,
    scatter_add_transposed,
    scratch_rows,
)


@triton.jit(do_not_specialize=["first"])
def right_product_kernel(
    weights, rights, advantageous, scratch, first,
    width, row_stride, column_stride, scratch_stride,
    P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z[i] = R[i] X[i]: `ops.monarch.multiply_right`."""
    block, place = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    weight = float_pointer(weights, first + place, ALIGNED)
    right = float_pointer(rights, first + place, ALIGNED)
    indices = index_pointer(advantageous, first + place, ALIGNED)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, Q, STEP):
        inner = start + tl.arange(0, STEP)
        if TRANSPOSED:
            selected = gather_transposed(
                weight, indices, block * Q + start, block * Q + Q, column, width,
                row_stride, column_stride, STEP, COLUMNS,
            )  # fmt: skip
        else:
            index = tl.load(indices + block * Q + inner, mask=inner < Q, other=0)
            selected = gather(weight, index, inner < Q, columns, width, row_stride, column_stride)
        factor = block_of(right, block, rows, inner, Q, False)
        total = tl.dot(factor, selected, total, input_precision=PRECISION)
    places = (place.to(tl.int64) * (P * Q) + block * Q + rows)[:, None] * scratch_stride
    mask = (rows < Q)[:, None] & (columns < width)[None, :]
    tl.store(scratch + places + columns[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["first"])
def left_product_kernel(
    weights, lefts, disadvantageous, scratch, sign, first,
    width, row_stride, column_stride, scratch_stride,
    P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[:, j] = L[j] Z[:, j]: `ops.monarch.multiply_left`.

    V[N] += sign * Y, or, TRANSPOSED, Y into the place of Z.
    """
    block, place = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    left = float_pointer(lefts, first + place, ALIGNED)
    middle = scratch + place.to(tl.int64) * (P * Q) * scratch_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, P, STEP):
        inner = start + tl.arange(0, STEP)
        lines = (inner * Q + block).to(tl.int64)
        values = scratch_rows(middle, lines, inner < P, columns, width, scratch_stride)
        factor = block_of(left, block, rows, inner, P, False)
        total = tl.dot(factor, values, total, input_precision=PRECISION)
    if TRANSPOSED:
        # The block is read and written by this program only, but by other threads of it.
        tl.debug_barrier()
        places = (rows * Q + block).to(tl.int64)[:, None] * scratch_stride + columns[None, :]
        tl.store(middle + places, total, mask=(rows < P)[:, None] & (columns < width)[None, :])
    else:
        weight = float_pointer(weights, first + place, ALIGNED)
        indices = index_pointer(disadvantageous, first + place, ALIGNED)
        index = tl.load(indices + rows * Q + block, mask=rows < P, other=0)
        scatter_add(
            weight, total * sign, index, rows < P, columns, width, row_stride, column_stride
        )


@triton.jit(do_not_specialize=["first"])
def add_transposed_kernel(
    weights, disadvantageous, scratch, sign, first,
    width, row_stride, column_stride, scratch_stride, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """V[N] += sign * Y: `ops.reference.add`, where V's expanded axis is the contiguous one."""
    place = tl.program_id(2)
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    weight = float_pointer(weights, first + place, ALIGNED)
    indices = index_pointer(disadvantageous, first + place, ALIGNED)
    lines = place.to(tl.int64) * size + rows
    tile = scratch_rows(scratch, lines, rows < size, columns, width, scratch_stride) * sign
    scatter_add_transposed(
        weight, tile, indices, row, size, column, width, row_stride, column_stride, ROWS, COLUMNS
    )


@triton.jit(do_not_specialize=["first"])
def take_transposed_kernel(
    gradients, disadvantageous, received, first,
    width, row_stride, column_stride, scratch_stride, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """G[N] as [n, width]: `ops.reference.take`, where G's expanded axis is the contiguous one."""
    place = tl.program_id(2)
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    gradient = float_pointer(gradients, first + place, ALIGNED)
    indices = index_pointer(disadvantageous, first + place, ALIGNED)
    tile = gather_transposed(
        gradient, indices, row, size, column, width, row_stride, column_stride, ROWS, COLUMNS
    )
    places = (place.to(tl.int64) * size + rows)[:, None] * scratch_stride + columns[None, :]
    mask = (rows < size)[:, None] & (columns < width)[None, :]
    tl.store(received + places, tile, mask=mask)


@triton.jit(do_not_specialize=["first", "tiles", "splits"])
def left_backward_kernel(
    gradients, lefts, disadvantageous, scratch, received, partials, first,
    width, row_stride, column_stride, scratch_stride, partial_stride, tiles, splits,
    P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dL and dZ of `ops.reference.map_gradient`, by L.

    Part of dL[j] = Gy[:, j] Z[:, j]^T over some tiles, and dZ[:, j] = L[j]^T Gy[:, j] over Z.
    """
    split, block, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, ROWS)
    present = rows < P
    left = float_pointer(lefts, first + place, ALIGNED)
    gradient = float_pointer(gradients, first + place, ALIGNED)
    indices = index_pointer(disadvantageous, first + place, ALIGNED)
    index = tl.load(indices + rows * Q + block, mask=present, other=0)
    if STEP == ROWS:
        flipped = block_of(left, block, rows, rows, P, True)
    base = place.to(tl.int64) * (P * Q) + block
    lines = (base + rows * Q)[:, None] * scratch_stride
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for tile in range(split * tiles, split * tiles + tiles):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < width)[None, :]
        places = lines + columns[None, :]
        if TRANSPOSED:
            incoming = tl.load(received + places, mask=mask, other=0.0)
        else:
            incoming = gather(gradient, index, present, columns, width, row_stride, column_stride)
        middle = tl.load(scratch + places, mask=mask, other=0.0)
        total = tl.dot(incoming, tl.trans(middle), total, input_precision=PRECISION)
        if STEP == ROWS:
            outgoing = tl.dot(flipped, incoming, input_precision=PRECISION)
        else:
            outgoing = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, P, STEP):
                inner = start + tl.arange(0, STEP)
                if TRANSPOSED:
                    values = scratch_rows(
                        received, base + inner * Q, inner < P, columns, width, scratch_stride
                    )
                else:
                    some = tl.load(indices + inner * Q + block, mask=inner < P, other=0)
                    values = gather(
                        gradient, some, inner < P, columns, width, row_stride, column_stride
                    )
                part = block_of(left, block, rows, inner, P, True)
                outgoing = tl.dot(part, values, outgoing, input_precision=PRECISION)
        tl.debug_barrier()  # other threads of this program may still read Z
        tl.store(scratch + places, outgoing, mask=mask)
    result = partials + (place * splits + split).to(tl.int64) * partial_stride + block * (P * P)
    square = present[:, None] & present[None, :]
    tl.store(result + rows[:, None] * P + rows[None, :], total, mask=square)


@triton.jit(do_not_specialize=["first", "tiles", "splits"])
def right_backward_kernel(
    weights, gradients, rights, advantageous, scratch, partials, first,
    width, row_stride, column_stride, scratch_stride, partial_stride, tiles, splits,
    P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dR and G[P] of `ops.reference.map_gradient`, by R.

    Part of dR[i] = dZ[i] X[i]^T over some tiles, and G[P] += R^T dZ.
    """
    split, block, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, ROWS)
    present = rows < Q
    weight = float_pointer(weights, first + place, ALIGNED)
    gradient = float_pointer(gradients, first + place, ALIGNED)
    right = float_pointer(rights, first + place, ALIGNED)
    indices = index_pointer(advantageous, first + place, ALIGNED)
    index = tl.load(indices + block * Q + rows, mask=present, other=0)
    if STEP == ROWS:
        flipped = block_of(right, block, rows, rows, Q, True)
    base = place.to(tl.int64) * (P * Q) + block * Q
    lines = (base + rows)[:, None] * scratch_stride
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for tile in range(split * tiles, split * tiles + tiles):
        column = tile * COLUMNS
        columns = column + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < width)[None, :]
        incoming = tl.load(scratch + lines + columns[None, :], mask=mask, other=0.0)
        if TRANSPOSED:
            selected = gather_transposed(
                weight, indices, block * Q, block * Q + Q, column, width,
                row_stride, column_stride, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            selected = gather(weight, index, present, columns, width, row_stride, column_stride)
        total = tl.dot(incoming, tl.trans(selected), total, input_precision=PRECISION)
        if STEP == ROWS:
            addition = tl.dot(flipped, incoming, input_precision=PRECISION)
        else:
            addition = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, Q, STEP):
                inner = start + tl.arange(0, STEP)
                values = scratch_rows(
                    scratch, base + inner, inner < Q, columns, width, scratch_stride
                )
                part = block_of(right, block, rows, inner, Q, True)
                addition = tl.dot(part, values, addition, input_precision=PRECISION)
        if TRANSPOSED:
            scatter_add_transposed(
                gradient, addition, indices, block * Q, block * Q + Q, column, width,
                row_stride, column_stride, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            scatter_add(
                gradient, addition, index, present, columns, width, row_stride, column_stride
            )
    result = partials + (place * splits + split).to(tl.int64) * partial_stride + block * (Q * Q)
    square = present[:, None] & present[None, :]
    tl.store(result + rows[:, None] * Q + rows[None, :], total, mask=square)


@triton.jit
def sum_splits_kernel(partials, totals, splits, stride, BLOCK: tl.constexpr):
    """totals[m] = partials[m].sum(0), always in the order of the splits."""
    place = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < stride
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = partials + (place * splits + split) * stride + columns
        total += tl.load(part, mask=mask, other=0.0)
    tl.store(totals + place * stride + columns, total, mask=mask)
