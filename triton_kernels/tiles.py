"""Tile sizes, chosen on the host from shapes alone.

There is no autotuning: triton's decorator for it needs a GPU at import, and a result must not
depend on which configuration happened to be the fastest. README.md has the registers and the
shared memory that each choice compiles to.
"""

from typing import NamedTuple

# The smallest tile that the GPU's matrix units take, in every dimension of a product.
_SMALLEST = 16

# Programs that keep a GPU of 100 to 150 multiprocessors busy. A fixed number rather than the
# device's own, so that the order of a sum, and with it its last bits, is the same on every device.
_ENOUGH_PROGRAMS = 1024

# Edge of the largest blocks of Monarch factors: a block's gradient has to fit into the registers of
# one program.
LARGEST_BLOCK = 128


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def divide_up(size: int, part: int) -> int:
    """How many parts cover `size`."""
    return -(-size // part)


def padded(size: int) -> int:
    """The tile edge that covers `size` rows of a product."""
    return max(_SMALLEST, power_of_two(size))


class BlockTiles(NamedTuple):
    """Of one block and its rows of a [n, width] matrix.

    `rows` and steps of `step` cover the block, `columns` a part of the width. While one tile is
    worked on, the next `stages - 1` are on their way.
    """

    rows: int
    step: int
    columns: int
    warps: int
    stages: int = 1

    def turns(self, width: int, splits: int) -> int:
        """Tiles that one of `splits` programs goes through."""
        return divide_up(divide_up(width, self.columns), splits)


def product_tiles(block: int, width: int) -> BlockTiles:
    """For Z[i] = R[i] X[i] and Y[:, j] = L[j] Z[:, j].

    Args:
        block: p or q.
        width: columns of X.
    """
    rows = padded(block)
    step = 16 if divide_up(block, 16) % 2 else 32
    columns = min(128 if rows <= 32 else 32, padded(width))
    return BlockTiles(rows, step, columns, 4)


def left_backward_tiles(block: int, width: int) -> BlockTiles:
    """For dL[j], dZ[:, j].

    Args:
        block: p.
        width: columns of X.
    """
    return _backward_tiles(block, width, {16: (64, 4), 32: (32, 2), 64: (16, 4), 128: (16, 8)})


def right_backward_tiles(block: int, width: int) -> BlockTiles:
    """For dR[i], the addition to G[P].

    Args:
        block: q.
        width: columns of X.
    """
    return _backward_tiles(block, width, {16: (64, 4), 32: (32, 2), 64: (16, 4, 2), 128: (16, 8)})


def _backward_tiles(block: int, width: int, choices: dict[int, tuple[int, ...]]) -> BlockTiles:
    """By the padded block: columns, warps and stages."""
    rows = padded(block)
    # A whole block of 128 rows would need 144 KB of shared memory, more than most GPUs have, and
    # spill hundreds of bytes per thread.
    step = rows if rows <= 64 else _SMALLEST
    columns, *others = choices[rows]
    return BlockTiles(rows, step, min(columns, padded(width)), *others)


def shared_memory(p: int, q: int) -> int:
    """Bytes that one program of the Monarch kernels needs at most, up to compute capability 8.9.

    The gradient map's products need more than all others: both tf32 parts of two operands and
    what is on its way for the next turns, or the block's gradient on its way out of the registers,
    in rows that are 4 numbers apart. Later ones may need more, far below the 232,448 that they
    have: where this is 45,056 (blocks of 32 x 43), 9.0 needs 49,152, with triton 3.8 57,344.

    Args:
        p: as in the factors.
        q: as in the factors.
    """
    needs = []
    for tile in (left_backward_tiles(p, width=64), right_backward_tiles(q, width=64)):
        operands = 2 * 4 * tile.step * (tile.rows + tile.columns)
        coming = 4 * tile.rows * tile.columns * (tile.stages - 1)
        needs.append(max(operands + coming, 4 * tile.rows * (tile.rows + 4)))
    return max(needs)


class TokenTiles(NamedTuple):
    """Of an activation [samples, tokens, width]; `turns` tiles of tokens make a split."""

    tokens: int
    columns: int
    turns: int
    splits: int


def elementwise_tiles(tokens: int, width: int) -> TokenTiles:
    """For work without sums: one tile per program.

    Args:
        tokens: rows.
        width: columns.
    """
    columns = min(256, power_of_two(width))
    rows = min(2048 // columns, power_of_two(tokens), 64)
    return TokenTiles(rows, columns, 1, divide_up(tokens, rows))


def token_tiles(tokens: int, width: int) -> TokenTiles:
    """For sums over the tokens of a sample. The number of samples plays no part, see norms.py.

    Args:
        tokens: of a sample.
        width: of the activation.

    Returns:
        Tiles for `SUM_WARPS` warps, with a multiple of `SUM_TURNS` turns.
    """
    rows, columns = 8, min(128, power_of_two(width))
    turns = SUM_TURNS * divide_up(tokens, rows * SUM_TURNS * _MOST_SPLITS)
    return TokenTiles(rows, columns, turns, divide_up(tokens, rows * turns))


# Edges of the square tiles that are written the other way round than they are read.
TRANSPOSE_ROWS = 32
TRANSPOSE_COLUMNS = 64

# Of sums over tokens: so many tiles are on their way to a program at once.
SUM_TURNS = 8
SUM_WARPS = 2

# Entries that one program adds up over the splits.
SUM_BLOCK = 1024

# Columns of a tile of the second stage of sums over tokens, which holds all splits at once.
SUM_COLUMNS = 64

_MOST_SPLITS = 64


def split_count(programs: int, tiles: int) -> int:
    """Into how many parts to cut each of some sums, so that there are enough programs.

    Args:
        programs: how many sums there are.
        tiles: length of each sum.

    Returns:
        At most 64 and at most `tiles`; a power of two where it is below `tiles`.
    """
    return min(power_of_two(divide_up(_ENOUGH_PROGRAMS, programs)), tiles, _MOST_SPLITS)
