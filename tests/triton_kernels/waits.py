"""How often the host waits for the device during a call."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Calls of the CUDA runtime that return when the device is done. The profiler's own end is a
# cudaDeviceSynchronize, which is why that one is not counted here; torch's warnings tell of it.
_WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


class Waits(NamedTuple):
    """Of one call.

    Attributes:
        told: by torch: operations that wait, with the lines that called them (on the CPU: reads
            of single values, which would wait on a GPU).
        profiled: calls of the CUDA runtime that wait; None where no profile could be made.
    """

    told: list[str]
    profiled: int | None


def count_waits(function: Callable[[], object], device: torch.device, warmup: int = 3) -> Waits:
    """Run a function some times to warm up and once or twice under observation."""
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        with _Reads() as reads:
            function()
        return Waits(reads.found, None)
    return Waits(_told(function), _profiled(function))


def _told(function: Callable[[], object]) -> list[str]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    ]


def _profiled(function: Callable[[], object]) -> int | None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        function()
    counts = {event.key: event.count for event in profile.key_averages()}
    if not any(name in counts for name in _LAUNCHES):
        return None
    return sum(counts.get(name, 0) for name in _WAITING)


class _Reads(TorchDispatchMode):
    """Notes the operations whose result the host has to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))
