"""How far results scatter by chance, and how many seeds would show a small difference."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from reproduce.comparisons import Runs, difference, loss, training_difference

from apex_composer.report.estimates import t_quantile

# Nats that a campaign should be able to see, with this probability.
DELTA, POWER = 0.005, 0.8
MOST_SEEDS = 10_000


class Noise(NamedTuple):
    """How far results scatter by chance, in nats.

    Attributes:
        single: standard deviation of one arm's last losses between seeds.
        single_freedom: its degrees of freedom.
        paired: standard deviation of the differences with the baseline; None without several.
        paired_freedom: its degrees of freedom.
        seeds: pairs that would be needed to see `DELTA`; None where `paired` is.
    """

    single: float | None
    single_freedom: int
    paired: float | None
    paired_freedom: int
    seeds: int | None


def noise(arms: Sequence[tuple[Runs, Runs | None]]) -> Noise:
    """Pooled over arms: the root of the mean variance, weighted by degrees of freedom.

    What is equal to its baseline in every bit says nothing of chance and is left out.

    Args:
        arms: each with its baseline.
    """
    singles = [[loss(record, -1) for record in runs.records] for runs, _ in arms]
    found = [difference(runs, base, runs.ends[-1]) for runs, base in arms if base is not None]
    pairs = [own.values for own in found if own is not None and any(own.values)]
    single, paired = _pooled(singles), _pooled(pairs)
    seeds = None if paired[0] is None else seeds_needed(paired[0])
    return Noise(*single, *paired, seeds)


def training_scatter(arms: Sequence[tuple[Runs, Runs | None]]) -> tuple[float | None, int]:
    """Standard deviation of pairs' differences in the last stage's training loss, and its freedom.

    Args:
        arms: each with its baseline.
    """
    found = [training_difference(runs, base) for runs, base in arms if base is not None]
    return _pooled([own.values for own in found if own is not None and any(own.values)])


def _pooled(samples: Iterable[Sequence[float]]) -> tuple[float | None, int]:
    kept = [own for own in samples if len(own) > 1 and all(map(math.isfinite, own))]
    freedom = sum(len(own) - 1 for own in kept)
    if not freedom:
        return None, 0
    squares = sum((len(own) - 1) * statistics.variance(own) for own in kept)
    return math.sqrt(squares / freedom), freedom


def seeds_needed(deviation: float, delta: float = DELTA, power: float = POWER) -> int:
    """Pairs of runs that show a difference: two-sided test at 95 %, paired Student's t.

        the smallest n >= 2 with n >= ((t(n-1, 0.975) + t(n-1, power)) * deviation / delta)**2

    W. D. Dupont, W. D. Plummer: Power and sample size calculations, Controlled Clinical Trials 11
    (1990) 116-128.

    Args:
        deviation: standard deviation of the differences.
        delta: that is to be seen, in the same unit.
        power: probability of seeing it.

    Returns:
        `MOST_SEEDS` where it is that or more.
    """
    for n in range(2, MOST_SEEDS):
        sure = t_quantile(n - 1) if n <= 31 else _t(n - 1, 0.975)  # the table ends there
        if n >= ((sure + _t(n - 1, power)) * deviation / delta) ** 2:
            return n
    return MOST_SEEDS


def _t(freedom: int, probability: float) -> float:
    """Student's quantile by Abramowitz and Stegun 26.7.5: at most 1 % off at 0.8."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
