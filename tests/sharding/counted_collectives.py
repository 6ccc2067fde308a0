"""Counts torch.distributed's collectives inside chosen calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch.distributed

COLLECTIVES = (
    *("all_reduce", "all_to_all", "all_to_all_single", "all_gather", "all_gather_into_tensor"),
    *("all_gather_object", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("barrier", "send", "recv", "isend", "irecv", "gather", "scatter", "batch_isend_irecv"),
)


class Counter:
    """Attributes: calls, the names of what was called."""

    def __init__(self):
        self.calls: list[str] = []
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def install(self) -> None:
        """Wrap the functions of torch.distributed, for the rest of the process."""
        for name in COLLECTIVES:
            setattr(torch.distributed, name, self._counted(name, getattr(torch.distributed, name)))

    def _counted(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def counted(*args, **options):
            if self._counting:
                self.calls.append(name)
            return function(*args, **options)

        return counted
