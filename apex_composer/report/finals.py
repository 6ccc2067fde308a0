"""Perplexities at the end of training, and their differences from a baseline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apex_composer.report.crossings import TOTAL, validation_curve
from apex_composer.report.estimates import Estimate, difference, estimate
from apex_composer.report.groups import Group, differing_seeds


@dataclass(frozen=True)
class Final:
    """A group's last evaluation of one domain, or of all.

    Attributes:
        loss: nats per token.
        perplexity: exp of each run's loss, then the mean.
        loss_difference: minus that of the first baseline, nats per token; None for the baseline
            itself, without a baseline, and where the baseline has not evaluated this domain, or
            other text of it.
        perplexity_difference: the same of perplexities.
        paired: whether differences are between runs of equal seeds, those that the group has;
            otherwise their interval is Welch's, and they have one value, that of the means.
    """

    loss: Estimate
    perplexity: Estimate
    loss_difference: Estimate | None
    perplexity_difference: Estimate | None
    paired: bool


def are_paired(group: Group, baseline: Group) -> bool:
    """Whether the baseline has all its seeds: of the training, the data order and all others."""
    if not set(group.seeds) <= set(baseline.seeds) or None in group.seeds:
        return False
    return not differing_seeds(group, baseline)


def last_losses(group: Group, domain: str) -> list[float] | None:
    """Of each run, nats per token; None where one of them has not evaluated the domain."""
    curves = [validation_curve(run, domain) for run in group.runs]
    return [c.values[-1] for c in curves] if all(c and c.values for c in curves) else None


def all_domains(groups: Sequence[Group]) -> tuple[str, ...]:
    """Those that any run has evaluated, in their order, and `total` where any run's is known."""
    found = dict.fromkeys(d for g in groups for run in g.runs for d in run.validation)
    total = [TOTAL] if any(last_losses(group, TOTAL) for group in groups) else []
    return (*found, *(total if len(found) > 1 else []))


def find_final(group: Group, baseline: Group | None, domain: str) -> Final | None:
    """A group's last evaluation; None where it has not evaluated the domain."""
    own = last_losses(group, domain)
    if own is None:
        return None
    loss, perplexity = estimate(own), estimate([_exp(x) for x in own])
    others = None
    if baseline is not None and baseline.name != group.name:
        others = last_losses(baseline, domain)
        if not same_text(group, baseline, domain):
            others = None
    if others is None:
        return Final(loss, perplexity, None, None, False)
    paired = are_paired(group, baseline)
    if paired:
        by_seed = dict(zip(baseline.seeds, others, strict=True))
        others = [by_seed[seed] for seed in group.seeds]
    loss_difference = _subtract(own, others, paired)
    of_perplexity = _subtract([_exp(x) for x in own], [_exp(x) for x in others], paired)
    return Final(loss, perplexity, loss_difference, of_perplexity, paired)


def same_text(one: Group, other: Group, domain: str) -> bool:
    """Whether all runs of two groups evaluate the same text, by their numbers of predicted tokens.

    Args:
        domain: one, in which numbers that are not known say nothing against it; or `total`, which
            is of the same domains.
    """
    if domain != TOTAL:
        return len(predicted_tokens(one, other, domain)) < 2
    known = [set(run.validation) for group in (one, other) for run in group.runs if run.validation]
    domains = set().union(*known)
    return all(own == domains for own in known) and all(same_text(one, other, d) for d in domains)


def predicted_tokens(one: Group, other: Group, domain: str) -> list[int]:
    """The different numbers of tokens that two groups predict of a domain, as far as known."""
    counts = [run.validation_tokens.get(domain) for group in (one, other) for run in group.runs]
    return sorted({count for count in counts if count is not None})


def _subtract(own: Sequence[float], others: Sequence[float], paired: bool) -> Estimate:
    if not paired:
        return difference(own, others)
    return estimate([mine - other for mine, other in zip(own, others, strict=True)])


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)  # a diverged run is no error
