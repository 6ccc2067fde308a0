"""Times and how they are summarised."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

# More than the second-level cache of any GPU; read before every measured call, so that the call
# finds none of its data there, and no written data that has yet to leave it.
_FLUSHED_BYTES = 256 * 2**20
_CYCLES_PER_SECOND = 2e9


class Deadline:
    """When to stop taking on more work.

    Args:
        seconds: from now; None never.
    """

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether this much time is left."""
        return self._end is None or time.monotonic() + seconds < self._end


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def device_seconds(
    function: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3
) -> tuple[list[float], float]:
    """Times of a call on the device alone, as in a training where the host is ahead of it.

    Before each call the cache is emptied by reading, and the device is kept waiting for twice
    the time that the host needs to launch the call, so that no gap between launches is measured.
    `triton.testing.do_bench` does neither: it empties the cache by writing, which the call then
    has to wait for, and a call of several launches is timed with the host's gaps in it.

    Args:
        function: launches the work.
        device: on the CPU, wall times are taken.
        repeats: how often.
        warmup: calls before the first that counts; compilation is in them.

    Returns:
        Seconds of every call, and seconds that the host needed to launch one.
    """
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        times = [seconds_of(function, device) for _ in range(repeats)]
        return times, quartiles(times)["median"]
    flushed = torch.zeros(_FLUSHED_BYTES // 4, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        flushed.sum()
        torch.cuda._sleep(int(2 * host * _CYCLES_PER_SECOND))
        before.record()
        function()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in events], host


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; a single value is all three."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def ratios(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratios round by round, so that the machine's drift cancels."""
    return quartiles([own / other for own, other in zip(seconds, base, strict=True)])
