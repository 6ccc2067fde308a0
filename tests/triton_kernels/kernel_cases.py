"""Random batches of matrices, and what the float64 reference makes of them."""

import torch
from torch import Tensor

from apex_composer.ops import reference
from apex_composer.ops.monarch import MonarchFactors
from apex_composer.triton_kernels import MonarchBatch

SPARE = 3


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float((found.double() - exact).norm() / exact.norm())


class MonarchCase:
    """Matrices of one shape with random factors, sets in mixed order and spare indices."""

    def __init__(self, p: int, q: int, width: int, axis: int, device, *, matrices: int = 2):
        n, self.axis, self.device = p * q, axis, device
        orders = [torch.randperm(2 * n + SPARE) for _ in range(matrices)]
        self.advantageous = [order[:n].to(device) for order in orders]
        self.disadvantageous = [order[n : 2 * n].to(device) for order in orders]
        self.spare = [order[2 * n :].to(device) for order in orders]
        shape = (2 * n + SPARE, width) if axis == 0 else (width, 2 * n + SPARE)
        self.weights = [torch.randn(shape).to(device) for _ in orders]
        self.gradients = [torch.randn(shape).to(device) for _ in orders]
        self.lefts = [(torch.randn(q, p, p) / p**0.5).to(device) for _ in orders]
        self.rights = [(torch.randn(p, q, q) / q**0.5).to(device) for _ in orders]
        for own in (self.weights, self.gradients):
            for matrix, spare in zip(own, self.spare, strict=True):
                self.rows(matrix)[spare] = float("nan")

    def rows(self, matrix: Tensor) -> Tensor:
        """The matrix with its expanded axis first (a view)."""
        return matrix if self.axis == 0 else matrix.t()

    def batch(self, **settings) -> MonarchBatch:
        """Of the case's own tensors, which it changes."""
        return MonarchBatch(
            self.weights,
            self.lefts,
            self.rights,
            self.advantageous,
            self.disadvantageous,
            axis=self.axis,
            **settings,
        )

    def copy(self, own: list[Tensor]) -> list[Tensor]:
        """Clones."""
        return [tensor.clone() for tensor in own]

    def sets(self, place: int) -> tuple[Tensor, Tensor]:
        """P and N of one matrix."""
        return self.advantageous[place], self.disadvantageous[place]

    def folded(self, place: int, sign: int = 1) -> Tensor:
        """W_eff of one matrix in float64."""
        weight = self.weights[place].double()
        factors = self._factors(place)
        reference.fold(weight, factors, *self.sets(place), axis=self.axis, sign=sign)
        return weight

    def mapped(self, place: int, gradient: Tensor) -> tuple[Tensor, MonarchFactors]:
        """G after the map, and the factors' gradients, of one matrix in float64."""
        gradient = gradient.double()
        return gradient, reference.map_gradient(
            self.weights[place].double(),
            gradient,
            self._factors(place),
            *self.sets(place),
            axis=self.axis,
        )

    def _factors(self, place: int) -> MonarchFactors:
        return MonarchFactors(self.lefts[place].double(), self.rights[place].double())

    def without_spare(self, matrix: Tensor, place: int) -> Tensor:
        """The rows in P and N."""
        return self.rows(matrix)[torch.cat(self.sets(place))]
