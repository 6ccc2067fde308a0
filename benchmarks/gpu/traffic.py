"""The bytes that each algorithm has to move, counted by its passes over memory.

Two counts for K1. `needed`: what the formula reads and writes whatever the algorithm: W[P], W[N]
and back (fold); W[P], G[N], G[P] and back (map). `moved`: what the kernels read and write by
design, intermediate results in scratch memory included, and whole 32-byte sectors where single
columns of a weight are touched: a GPU moves no less. Operators' factors and sums of squares are
under 1 % and are left out, as is what the second-level cache saves.
"""

from typing import NamedTuple

from monarch_case import MonarchCase, Shape
from torch import Tensor

_SECTOR = 8  # float32 values of 32 bytes


class Traffic(NamedTuple):
    """Of one call.

    Attributes:
        passes: how `moved` comes about, in words.
        moved: bytes that the kernels move by design.
        needed: bytes that no algorithm can do without.
    """

    passes: str
    moved: int
    needed: int


def elementwise(elements: int, size: int, passes: str, count: int) -> Traffic:
    """`count` passes over as many elements of `size` bytes."""
    moved = elements * size * count
    return Traffic(f"{count} of {elements * size / 1e6:.0f} MB: {passes}", moved, moved)


def fold(case: MonarchCase) -> Traffic:
    """Of `MonarchBatch.fold`."""
    weight_passes = [case.advantageous, case.disadvantageous, case.disadvantageous]
    if case.shape.axis == 0:
        return _traffic(case, weight_passes, 2, "W[P], W[N] and back; Z out and in")
    return _traffic(case, weight_passes, 4, "W[P], W[N] and back; Z and Y out and in")


def map_gradient(case: MonarchCase) -> Traffic:
    """Of `MonarchBatch.map_gradient`; it reads W[P] twice, once for Z and once for dR."""
    positive, negative = case.advantageous, case.disadvantageous
    passes = [positive, positive, negative, positive, positive]
    if case.shape.axis == 0:
        return _traffic(case, passes, 4, "W[P] twice, G[N], G[P] and back; Z and dZ out and in", 4)
    words = "W[P] twice, G[N], G[P] and back; Z, dZ and G[N] out and in"
    return _traffic(case, passes, 6, words, 4)


def _traffic(
    case: MonarchCase, sets: list[list[Tensor]], scratch: int, words: str, needed: int = 3
) -> Traffic:
    """Passes over `sets` of a weight or gradient, and `scratch` passes over [n, width]."""
    shape = case.shape
    dense = 4 * shape.n * shape.width * shape.matrices
    touched = sum(_touched(shape, indices) for own in sets for indices in own)
    text = f"{len(sets)} + {scratch} of {dense / 1e6:.0f} MB: {words}"
    return Traffic(text, touched + scratch * dense, needed * dense)


def _touched(shape: Shape, indices: Tensor) -> int:
    """Bytes of a matrix in which the chosen rows or columns lie."""
    if shape.axis == 0:
        return 4 * len(indices) * shape.width
    return 4 * _SECTOR * len((indices // _SECTOR).unique()) * shape.width
