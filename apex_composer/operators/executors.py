"""Who does a step's work on whole weights: every operator by itself, or several in one kernel."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import Protocol

from torch import nn

from apex_composer.operators.operator import ExpansionOperator, as_matrix, left_to_do
from apex_composer.ops.dispatch import monarch_kernels, resolve_monarch
from apex_composer.ops.monarch import add_gradients


class Executor(Protocol):
    """Acts on the weights and gradients of one or several sites, for their operators.

    Attributes:
        folded: whether the parameters hold the effective weights, as they do outside of steps.
    """

    folded: bool

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P]."""

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P]."""

    def restore(self) -> None:
        """Fold after a failed step, by this rank alone."""

    def refresh(self) -> None:
        """The weights were changed since the fold: W_eff is what they hold now, T stays."""

    def parameters(self) -> list[nn.Parameter]:
        """Those that it writes."""

    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""

    def relative_norms(self) -> dict[str, float]:
        """|T W[P]| / |W_eff[N]| by site (waits for the device; collective where sharded)."""


def whole_executors(
    operators: Sequence[ExpansionOperator], implementation: str = "auto"
) -> list[Executor]:
    """Executors that together act for operators whose weights this rank holds whole.

    Args:
        operators: those of one stage, or some of them.
        implementation: `auto`, `torch` or `triton`. Default `auto`.

    Raises:
        ValueError: as `resolve_monarch`.
    """
    alone: list[Executor] = []
    alike: dict[tuple, list[ExpansionOperator]] = defaultdict(list)
    for operator in operators:
        weight, (p, q) = operator.site.weight, operator.factors.right.shape[:2]
        if resolve_monarch(implementation, weight.device, weight.dtype, p, q) == "torch":
            alone.append(operator)
        else:
            layout = tuple((p.shape, p.stride()) for p in operator.site.parameters())
            alike[layout, operator.site.axis, len(operator.advantageous)].append(operator)
    return alone + [KernelExecutor(several) for several in alike.values()]


class KernelExecutor:
    """The operators of all weights of one shape, each step of theirs in two or three launches.

    Equals what the operators do one by one (`ExpansionOperator`, the reference). D = T
    W[P] is computed again to unfold: W[P] is unchanged since the fold, so it has the same bits.

    Args:
        operators: those of weights alike in shape, strides, axis and n.
    """

    def __init__(self, operators: Sequence[ExpansionOperator]):
        self._operators, self._axis = operators, operators[0].site.axis
        self._take(self._present())
        self._held = [True] * len(self._batches)  # of weights and of biases: an error may part them

    def _present(self) -> list[tuple[nn.Parameter, ...]]:
        """The weights as the modules hold them now, and the biases."""
        return list(zip(*(o.site.parameters() for o in self._operators), strict=True))

    def _take(self, found: list[tuple[nn.Parameter, ...]]) -> None:
        """Act on these parameters from now on."""
        self._parameters = found
        # The parameter itself: its memory may be replaced, and is looked up at every call. A bias
        # is seen as a matrix, see `_look_up`.
        self._matrices = [
            [p if p.dim() == 2 else as_matrix(p, self._axis) for p in parameters]
            for parameters in self._parameters
        ]
        self._batches = [
            monarch_kernels()(
                matrices,
                [o.factors.left for o in self._operators],
                [o.factors.right for o in self._operators],
                [o.advantageous for o in self._operators],
                [o.disadvantageous for o in self._operators],
                axis=self._axis,
            )
            for matrices in self._matrices
        ]

    @property
    def folded(self) -> bool:
        """Whether all parameters hold the effective weights."""
        return all(self._held)

    def fold(self) -> None:
        """W[N] <- W[N] + T W[P] for every weight, and bias."""
        self._add(+1)

    restore = fold

    def _add(self, sign: int) -> None:
        self._look_up()
        for place in left_to_do(self._held, sign):
            self._batches[place].fold(sign)
            self._held[place] = sign > 0

    def refresh(self) -> None:
        """Nothing is kept between a fold and an unfold."""

    def parameters(self) -> list[nn.Parameter]:
        """All weights, and biases."""
        return [parameter for parameters in self._present() for parameter in parameters]

    def unfold(self) -> None:
        """W[N] <- W[N] - T W[P] for every weight, and bias."""
        self._add(-1)

    def map_gradient(self) -> None:
        """As `ExpansionOperator.map_gradient`, for every weight, and bias."""
        for operator in self._operators:
            for factor in operator.factors:
                factor.grad = None
        self._look_up()
        for batch, parameters in zip(self._batches, self._parameters, strict=True):
            gradients = [
                p.grad if p.grad is None else as_matrix(p.grad, self._axis) for p in parameters
            ]
            found = zip(*batch.map_gradient(gradients), strict=True)
            for operator, own in zip(self._operators, found, strict=True):
                add_gradients(operator.factors, own)

    def _look_up(self) -> None:
        """Follow the modules to the parameters that they hold now, and these to where they lie."""
        found = self._present()
        if any(map(is_not, *map(chain.from_iterable, (found, self._parameters)))):
            self._take(found)
        for parameters, matrices in zip(self._parameters, self._matrices, strict=True):
            for parameter, matrix in zip(parameters, matrices, strict=True):
                if matrix.data_ptr() != parameter.data_ptr():
                    matrix.data = as_matrix(parameter, self._axis)

    def relative_norms(self) -> dict[str, float]:
        """As `ExpansionOperator.relative_norms`, of all sites."""
        return {name: x for o in self._operators for name, x in o.relative_norms().items()}
