"""Who does a step's work: every operator by itself in plain torch, or several in one kernel.

The only file that imports the kernels.
"""

from collections.abc import Sequence
from typing import Protocol

from apex_composer.expansion import ExpansionOperator


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

    def map_gradient(self) -> None:
        """From dLoss/dW_eff to dLoss/dW, in place, and to the factors' gradients, in `.grad`."""


def make_executors(operators: Sequence[ExpansionOperator]) -> list[Executor]:
    """Executors that together act for all operators.

    Args:
        operators: of one stage.
    """
    return list(operators)
