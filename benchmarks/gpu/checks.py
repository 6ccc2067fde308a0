"""What the checks of correctness have in common."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Finding(NamedTuple):
    """One comparison: holds where `error` is at most `bound` (NaN never is)."""

    what: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


class Check(NamedTuple):
    """A name and what compares; nothing runs before `run` is called."""

    what: str
    run: Callable[[], list[Finding]]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    norm = exact.norm()
    difference = (found.double() - exact).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def differing(one: Tensor, other: Tensor) -> float:
    """Share of entries whose values differ; NaN equals NaN."""
    if one.numel() == 0:
        return 0.0
    return float(((one != other) & ~(one.isnan() & other.isnan())).double().mean())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else every product warns
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
