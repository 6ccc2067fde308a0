"""One site's expansion operator: its factors, and what it does to the weight and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apex_composer.assessment.selection import Selection, seeded_generator
from apex_composer.model.sites import Site
from apex_composer.ops import reference
from apex_composer.ops.monarch import MonarchFactors, add_gradients, init_factors, multiply


class ExpansionOperator:
    """T of paper eq. 7-12 for one site: W_eff[N] = W[N] + T W[P] along the site's axis.

    Where units are outputs their biases are expanded with them, as one more column of W (axis 0).

    Args:
        site: the weight and its axis.
        selection: the group's units in P and N.
        factors: L and R; None draws fresh ones (T = 0) from `seed`, `stage` and the site's name.
        seed: the run's.
        stage: number of the run's stage, counted from 0.

    Attributes:
        folded: whether the parameter holds the effective weight, as it does outside of steps.
    """

    def __init__(
        self,
        site: Site,
        selection: Selection,
        factors: Sequence[Tensor] | None = None,
        *,
        seed: int = 0,
        stage: int = 0,
    ):
        device, dtype = site.weight.device, site.weight.dtype
        self.site = site
        self._deltas: list[Tensor] | None = None
        self._held = [True] * len(site.parameters())  # an error may part weight and bias
        self.advantageous = site.indices(selection.advantageous.to(device))
        self.disadvantageous = site.indices(selection.disadvantageous.to(device))
        if factors is None:
            generator = seeded_generator(seed, "factors", stage, site.name)
            size = len(self.advantageous)
            factors = init_factors(size, generator=generator, dtype=dtype, device=device)
        self.factors = MonarchFactors(
            *(f.to(device=device, dtype=dtype, copy=True) for f in factors)
        )

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P]: the parameter holds the effective weight."""
        self._deltas = self._expand()
        self._add(+1)

    @property
    def folded(self) -> bool:
        """Whether weight and bias hold the effective ones."""
        return all(self._held)

    restore = fold  # nobody else is needed for it

    def refresh(self) -> None:
        """The weight was changed since the fold: T W[P] is computed anew, as in a resumed run."""
        self._deltas = None

    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where the units are outputs."""
        return self.site.parameters()

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P]: the parameter holds the base weight.

        What is subtracted is what the last fold added. A resumed run, which has not folded yet,
        computes it from the same W[P], L and R: the same bits.
        """
        if self._deltas is None:
            self._deltas = self._expand()
        self._add(-1)
        self._deltas = None

    def _expand(self) -> list[Tensor]:
        return [
            reference.expand(matrix, self.factors, self.advantageous, axis=self.site.axis)
            for matrix in self._matrices()
        ]

    def _add(self, sign: int) -> None:
        matrices, rows = self._matrices(), self.disadvantageous
        for place in left_to_do(self._held, sign):
            matrix, delta = matrices[place], self._deltas[place]
            reference.add(matrix, delta, rows, axis=self.site.axis, sign=sign)
            self._held[place] = sign > 0

    def _matrices(self) -> list[Tensor]:
        return [as_matrix(parameter, self.site.axis) for parameter in self.site.parameters()]

    def map_gradient(self) -> None:
        """Turn the effective gradient into those of W (in place) and of the factors (`.grad`).

        A weight without a gradient (frozen, or not reached by the loss) leaves the factors
        without one too, so that the optimizer passes over them.
        """
        for factor in self.factors:
            factor.grad = None
        for parameter in self.site.parameters():
            if parameter.grad is None:
                continue
            part = reference.map_gradient(
                as_matrix(parameter, self.site.axis),
                as_matrix(parameter.grad, self.site.axis),
                self.factors,
                self.advantageous,
                self.disadvantageous,
                axis=self.site.axis,
            )
            add_gradients(self.factors, part)

    @torch.no_grad()
    def relative_norm(self) -> Tensor:
        """|T W[P]| / |W_eff[N]|, the operator's share of the rows it writes; a scalar tensor."""
        weight = self.site.weight
        selected = reference.take(weight, self.advantageous, self.site.axis)
        target = reference.take(weight, self.disadvantageous, self.site.axis)
        norm = torch.linalg.vector_norm
        return norm(multiply(self.factors, selected)) / norm(target).clamp_min(1e-30)

    def relative_norms(self) -> dict[str, float]:
        """`relative_norm` by the site's name; waits for the device."""
        return {self.site.name: float(self.relative_norm())}


def left_to_do(held: Sequence[bool], sign: int) -> list[int]:
    """Which of a site's weight and bias are to be folded (+1) or unfolded (-1).

    Args:
        held: whether each holds the effective one.
        sign: of what is added.

    Returns:
        All, or those that an error has left behind the others.
    """
    behind = [place for place, own in enumerate(held) if own != (sign > 0)]
    return behind or [*range(len(held))]


def as_matrix(parameter: nn.Parameter | Tensor, axis: int) -> Tensor:
    """A view that in-place writes go through, with the units along the axis.

    A bias becomes a matrix of one column (axis 0), or of one row (1, where weights are transposed).
    """
    values = parameter.detach()
    return values.unsqueeze(1 - axis) if values.dim() == 1 else values
