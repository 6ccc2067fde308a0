"""Time spent inside blocks, without waiting for the GPU until the time is read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of the blocks run under it while it is running.

    On CUDA the blocks are bracketed by events, so only `read()` waits for the device. It is
    switched on for the few steps whose time is logged: 44 hooks a forward pass would make
    hundreds of events.
    """

    def __init__(self) -> None:
        self.running = False
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def block(self, device: torch.device) -> Iterator[None]:
        """Count the time of this block (if running), on the CPU or on the CUDA `device`."""
        if not self.running:
            yield
        elif device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_time

    def read(self) -> float:
        """Milliseconds since the last reading; starts again at zero."""
        milliseconds = 1000 * self._seconds
        for start, end in self._events:
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        self._seconds, self._events = 0.0, []
        return milliseconds
