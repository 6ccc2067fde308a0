"""Random weights with Monarch operators, in the shapes of real models: what is timed and tested."""

from typing import NamedTuple

import torch
from torch import Tensor

from apex_composer import triton_kernels
from apex_composer.ops import reference
from apex_composer.ops.monarch import MonarchFactors


class Shape(NamedTuple):
    """Of one kind of weight.

    Attributes:
        name: whose it is.
        size: length of the expanded axis.
        width: length of the other axis.
        p: as in the factors; n = p * q.
        q: as in the factors.
        axis: the expanded one.
        unit_size: consecutive indices of one unit.
        matrices: number in one launch.
    """

    name: str
    size: int
    width: int
    p: int
    q: int
    axis: int
    unit_size: int = 1
    matrices: int = 2

    @property
    def n(self) -> int:
        """Rows that an operator maps."""
        return self.p * self.q

    def __str__(self) -> str:
        shape = (self.size, self.width) if self.axis == 0 else (self.width, self.size)
        return f"{self.name} {list(shape)} n={self.n} axis {self.axis}"


# At a threshold of 12.5 %, but for the keys: TinyLLaMA's 4 KV heads are too few for it.
TINYLLAMA = [
    Shape("TinyLLaMA gate and up", 5632, 2048, 22, 32, axis=0),
    Shape("TinyLLaMA down", 5632, 2048, 22, 32, axis=1),
    Shape("TinyLLaMA queries", 2048, 2048, 16, 16, axis=0, unit_size=64),
    Shape("TinyLLaMA attention output", 2048, 2048, 16, 16, axis=1, unit_size=64),
    Shape("TinyLLaMA keys", 256, 2048, 8, 8, axis=0, unit_size=64),
]
LLAMA_2_7B = [
    Shape("LLaMA-2-7B gate and up", 11008, 4096, 32, 43, axis=0),
    Shape("LLaMA-2-7B down", 11008, 4096, 32, 43, axis=1),
    Shape("LLaMA-2-7B queries", 4096, 4096, 16, 32, axis=0, unit_size=128),
    Shape("LLaMA-2-7B attention output", 4096, 4096, 16, 32, axis=1, unit_size=128),
]


class MonarchCase:
    """Matrices of one shape with random factors and sets.

    What is in neither set is NaN: a kernel that reads it shows.

    Args:
        shape: of the matrices.
        device: where they are made.
        seed: of the numbers.
        mixed: whether the sets are in mixed order of units; default ascending, as in training.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int = 17, *, mixed: bool = False):
        self.shape, self.device, self._mixed = shape, device, mixed
        self._generator = torch.Generator(device).manual_seed(seed)
        count, p, q = shape.matrices, shape.p, shape.q
        chosen = [self._sets() for _ in range(count)]
        self.advantageous, self.disadvantageous, self.spare = map(list, zip(*chosen, strict=True))
        sizes = (shape.size, shape.width) if shape.axis == 0 else (shape.width, shape.size)
        self.weights = [self._normal(*sizes) for _ in range(count)]
        self.gradients = [self._normal(*sizes) for _ in range(count)]
        for own in (self.weights, self.gradients):
            for matrix, spare in zip(own, self.spare, strict=True):
                self.rows(matrix)[spare] = float("nan")
        self.lefts = [self._normal(q, p, p) / p**0.5 for _ in range(count)]
        self.rights = [self._normal(p, q, q) / q**0.5 for _ in range(count)]

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._generator, device=self.device)

    def _sets(self) -> tuple[Tensor, ...]:
        """P, N and what is in neither."""
        unit_size, n = self.shape.unit_size, self.shape.n
        units = torch.randperm(
            self.shape.size // unit_size, generator=self._generator, device=self.device
        )
        within = torch.arange(unit_size, device=self.device)
        indices = (units.unsqueeze(1) * unit_size + within).flatten()
        sets = indices.split([n, n, len(indices) - 2 * n])
        return tuple(own.clone() if self._mixed else own.sort().values for own in sets)

    def batch(self, **settings) -> triton_kernels.MonarchBatch:
        """The kernels' batch of the case's own tensors, which it changes."""
        return triton_kernels.MonarchBatch(
            self.weights, self.lefts, self.rights, self.advantageous, self.disadvantageous,
            axis=self.shape.axis, **settings,
        )  # fmt: skip

    def rows(self, matrix: Tensor) -> Tensor:
        """The matrix with its expanded axis first (a view)."""
        return matrix if self.shape.axis == 0 else matrix.t()

    def fold(self, place: int, weight: Tensor) -> None:
        """Fold one matrix's operator into `weight` by the reference, in the weight's dtype."""
        reference.fold(
            weight, self._factors(place, weight.dtype), *self.sets(place), axis=self.shape.axis
        )

    def map_gradient(self, place: int, weight: Tensor, gradient: Tensor) -> MonarchFactors:
        """Map one gradient in place by the reference, in the weight's dtype."""
        return reference.map_gradient(
            weight, gradient, self._factors(place, weight.dtype), *self.sets(place),
            axis=self.shape.axis,
        )  # fmt: skip

    def sets(self, place: int) -> tuple[Tensor, Tensor]:
        """P and N of one matrix."""
        return self.advantageous[place], self.disadvantageous[place]

    def _factors(self, place: int, dtype: torch.dtype) -> MonarchFactors:
        return MonarchFactors(self.lefts[place].to(dtype), self.rights[place].to(dtype))
