"""Where the time of an arm's step goes, and what of it is not in another arm's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from arms import ARMS, Training
from measuring import seconds_of
from report import Report
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_ROWS = 40


def write_profiles(
    training: Training, names: Sequence[str], ids: Tensor, folder: Path, report: Report
) -> None:
    """One file for each arm: torch's table, and for APEX the kernels that its base has less of.

    Args:
        training: whose steps are profiled.
        names: of the arms.
        ids: of a step; two microbatches show everything and keep the profile small.
        folder: of the files.
        report: gets a line for each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*(ARMS[name].base for name in names), *names]):
        times[name], table, parts = _profile(training, name, ids)
        path = folder / f"{name}.txt"
        base = ARMS[name].base
        text = f"{name}, one step of {len(ids)} sequences\n"
        if parts is not None:
            text += f"APEX's own parts by its stopwatch: {parts:.3f} ms\n"
        if base != name:
            text += f"\n{_difference(times[name], times[base], base)}\n"
        path.write_text(f"{text}\n{table}\n")
        report.add(f"{name}: profile", path.name, arm=name, apex_parts_milliseconds=parts)


def _profile(
    training: Training, name: str, ids: Tensor
) -> tuple[dict[str, float], str, float | None]:
    """Microseconds by kernel, torch's table, and milliseconds in APEX's own parts."""
    cuda = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    with training.running(ARMS[name], ids) as (step, expander):
        step(ids)
        with profile(activities=activities) as found:
            seconds_of(lambda: step(ids), training.device)
        parts = None
        if expander is not None:  # in a step of its own: its events would show in the profile
            expander.stopwatch.running = True
            seconds_of(lambda: step(ids), training.device)
            parts = expander.stopwatch.read()
    averages = found.key_averages()
    times = {event.key: getattr(event, key) for event in averages if not cuda or _is_kernel(event)}
    return times, averages.table(sort_by=key, row_limit=_ROWS), parts


def _is_kernel(event) -> bool:
    """Operators and annotations carry the time of kernels below them, which would count twice."""
    on_device = event.device_type != torch.autograd.DeviceType.CPU
    return on_device and not getattr(event, "is_user_annotation", False)


def _difference(own: dict[str, float], base: dict[str, float], name: str) -> str:
    """Kernels by the time they take more or less than in another arm."""
    keys = own.keys() | base.keys()
    differences = {key: own.get(key, 0.0) - base.get(key, 0.0) for key in keys}
    order = sorted(keys, key=lambda key: -abs(differences[key]))[:_ROWS]
    lines = [f"{differences[key] / 1000:+10.3f} ms  {key[:100]}" for key in order]
    total = sum(differences.values()) / 1000
    return "\n".join([f"more than in {name}, in all {total:+.3f} ms:", *lines])
