"""How fast runs trained."""

import statistics
from dataclasses import dataclass

from apex_composer.report.groups import Group

MFU, APEX_TIME = "throughput/device/mfu", "apex/milliseconds_per_step"


@dataclass(frozen=True)
class Speed:
    """How fast a group trained, over the batches of all its runs.

    Attributes:
        median: seconds per batch, evaluation left out; None where nothing was kept.
        lower_quartile: of the same.
        upper_quartile: of the same.
        tokens_per_second: tokens of a batch over the median.
        mfu: median of what `speed_monitor` has logged, 0 to 1; None without it.
        apex_share: median of APEX's own time in a step over the median step; None without APEX.
        device: GPU or CPU, with their number.
    """

    median: float | None
    lower_quartile: float | None
    upper_quartile: float | None
    tokens_per_second: float | None
    mfu: float | None
    apex_share: float | None
    device: str


def measure(group: Group) -> Speed:
    """The quartiles of a group's steps, and what follows from them."""
    seconds = [second for run in group.runs for second in run.step_seconds]
    low = median = high = seconds[0] if len(seconds) == 1 else None
    if len(seconds) > 1:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    tokens = _tokens_per_batch(group)
    own = _median(group, APEX_TIME)
    return Speed(
        median,
        low,
        high,
        tokens / median if median and tokens else None,
        _median(group, MFU),
        own / 1000 / median if median and own is not None else None,
        ", ".join(dict.fromkeys(run.device for run in group.runs if run.device)) or "unknown",
    )


def _median(group: Group, metric: str) -> float | None:
    curves = [run.metrics[metric] for run in group.runs if metric in run.metrics]
    values = [value for curve in curves for value in curve.values]
    return statistics.median(values) if values else None


def _tokens_per_batch(group: Group) -> float | None:
    loss = group.runs[0].loss
    if len(loss.tokens) != len(loss.batches) or len(loss.batches) < 2:
        return None
    return (loss.tokens[-1] - loss.tokens[0]) / (loss.batches[-1] - loss.batches[0])
