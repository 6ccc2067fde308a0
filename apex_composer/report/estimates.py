"""Means over seeds, and how far they can be trusted."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 %, for 1 to 30 degrees of freedom; what has more takes the last, to be safe.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how far it can be trusted.

    Attributes:
        mean: over the seeds; with one seed its value.
        low: lower end of the 95 % interval (Student's t); None with one seed, and where a
            value is no number: a diverged run says nothing of the others.
        high: upper end.
        values: of each seed, or of each pair of equal seeds, in the order of the seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def t_quantile(freedom: float) -> float:
    """Half the width of a 95 % interval in standard errors, rounded up where it is no integer."""
    return _T[min(max(1, math.floor(freedom)), len(_T)) - 1]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with its interval: mean -+ t s / sqrt(n).

    Args:
        values: one at least.
    """
    mean = _mean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, tuple(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile(len(values) - 1) * error
    return Estimate(mean, mean - half, mean + half, tuple(values))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values)


def difference(own: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of `own` minus that of `others`, which are not pairs: Welch's interval."""
    mean = _mean(own) - _mean(others)
    if min(len(own), len(others)) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, (mean,))
    parts = [(statistics.variance(values) / len(values), len(values)) for values in (own, others)]
    squared = sum(part for part, _ in parts)
    spread = sum(part**2 / (count - 1) for part, count in parts)
    half = t_quantile(squared**2 / spread) * math.sqrt(squared) if spread else 0.0
    return Estimate(mean, mean - half, mean + half, (mean,))
