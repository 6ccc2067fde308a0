"""Tokens to reach a baseline's final perplexity, from validation curves."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_composer.report.estimates import Estimate, estimate
from apex_composer.report.groups import Group
from apex_composer.report.run import Curve, Run

TOTAL = "total"  # in place of a domain: all predicted tokens of all domains


@dataclass(frozen=True)
class Crossing:
    """Where one validation curve comes down to a loss and stays there.

    The curve is taken to be linear in tokens between two evaluations. Validation loss falls ever
    more slowly, so its chord lies above it, and the tokens are if anything too many. It has come
    down at the first evaluation from which on all are at or below the target.

    Attributes:
        seed: of the run.
        target: nats per token, the baseline's last evaluation.
        tokens: where the line between `after` and `by` meets the target; None where the curve
            never comes down for good, or had come down before its first evaluation.
        after: tokens of the last evaluation above the target; 0 where there is none.
        by: tokens of the first evaluation from which on it holds; None: not reached.
        baseline_tokens: what the baseline had trained at its last evaluation.
    """

    seed: int | None
    target: float
    tokens: float | None
    after: int
    by: int | None
    baseline_tokens: int


@dataclass(frozen=True)
class Reach:
    """The tokens that a group needs to reach a baseline's final perplexity.

    Attributes:
        group: name of the group.
        baseline: name of the baseline.
        domain: `total` or a domain.
        crossings: of each seed (each pair of equal seeds where they are paired); none where a run
            of the baseline has ended no better than it began.
        tokens: over the seeds; None unless every seed has a crossing with tokens.
        share: tokens over the baseline's; None as `tokens`.
        text: all of it in a sentence, with its uncertainty or what is missing for a number.
    """

    group: str
    baseline: str
    domain: str
    crossings: tuple[Crossing, ...]
    tokens: Estimate | None
    share: Estimate | None
    text: str


def validation_curve(run: Run, domain: str) -> Curve | None:
    """A domain's curve, or that of all domains, weighted by their predicted tokens.

    The total is at the batches at which every domain was evaluated; None where a domain's tokens
    are unknown and there is more than one, or where nothing was evaluated.
    """
    if domain != TOTAL:
        return run.validation.get(domain)
    domains = sorted(run.validation)
    if len(domains) < 2:
        return run.validation[domains[0]] if domains else None
    if any(name not in run.validation_tokens for name in domains):
        return None
    weights = [run.validation_tokens[name] for name in domains]
    curves = [run.validation[name] for name in domains]
    by_batch = [dict(zip(c.batches, c.values, strict=True)) for c in curves]
    tokens = dict(zip(curves[0].batches, curves[0].tokens, strict=False))
    shared = [batch for batch in curves[0].batches if all(batch in own for own in by_batch)]
    if not shared:
        return None
    values = [
        sum(w * own[batch] for w, own in zip(weights, by_batch, strict=True)) / sum(weights)
        for batch in shared
    ]
    return Curve(shared, [tokens[batch] for batch in shared if batch in tokens], values)


def find_crossing(curve: Curve, target: float) -> tuple[float | None, int, int | None]:
    """`tokens`, `after` and `by` of a `Crossing`; a loss that is no number is above any target."""
    tokens, values = curve.tokens, curve.values
    above = [index for index, value in enumerate(values) if not value <= target]
    if not above:
        return (0.0 if tokens[0] == 0 else None), 0, tokens[0]
    last = above[-1]
    if last == len(values) - 1:
        return None, tokens[last], None
    before, beyond = values[last], values[last + 1]
    if not math.isfinite(before):
        return None, tokens[last], tokens[last + 1]
    part = (before - target) / (before - beyond)
    return tokens[last] + part * (tokens[last + 1] - tokens[last]), tokens[last], tokens[last + 1]


def find_reach(group: Group, baseline: Group, domain: str, paired: bool) -> Reach | None:
    """How soon a group is as good as a baseline at its end; None without curves over tokens.

    Args:
        paired: whether each seed is compared with the baseline's run of that seed, otherwise with
            the mean of the baseline's runs.
    """
    finals = [_last(validation_curve(run, domain)) for run in baseline.runs]
    curves = [validation_curve(run, domain) for run in group.runs]
    if None in finals or not all(c and len(c.tokens) == len(c.values) > 0 for c in curves):
        return None
    if risen := _risen(group, baseline, domain, paired):
        return Reach(group.name, baseline.name, domain, (), None, None, risen)
    crossings = []
    by_seed: Mapping = dict(zip(baseline.seeds, finals, strict=True))
    mean = tuple(statistics.fmean(column) for column in zip(*finals, strict=True))
    for seed, curve in zip(group.seeds, curves, strict=True):
        if paired and seed not in by_seed:
            continue
        tokens, target = by_seed[seed] if paired else mean
        crossings.append(Crossing(seed, target, *find_crossing(curve, target), int(tokens)))
    found = [crossing.tokens for crossing in crossings]
    whole = None not in found
    shares = [c.tokens / c.baseline_tokens for c in crossings] if whole else []
    return Reach(
        group.name,
        baseline.name,
        domain,
        tuple(crossings),
        estimate(found) if whole else None,
        estimate(shares) if whole else None,
        _describe(group.name, baseline.name, crossings, curves, paired),
    )


def _risen(group: Group, baseline: Group, domain: str, paired: bool) -> str:
    """That the baseline's own last loss is not below its first one; nothing where it is.

    So it is where a learning rate that had decayed rises again.
    """
    pairs = zip(baseline.seeds, baseline.runs, strict=True)
    runs = [run for seed, run in pairs if not paired or seed in group.seeds]
    curves = [validation_curve(run, domain) for run in runs]
    risen = [c for c in curves if c.tokens[0] == 0 and not c.values[-1] < c.values[0]]
    if not risen:
        return ""
    return (
        f"{baseline.name} ends no better than it began ({len(risen)} of {len(runs)} seeds), so "
        "that the tokens to reach its final perplexity say nothing."
    )


def _last(curve: Curve | None) -> tuple[int, float] | None:
    if curve is None or not curve.values or len(curve.tokens) != len(curve.values):
        return None
    whole = curve.tokens[-1] > 0 and math.isfinite(curve.values[-1])
    return (curve.tokens[-1], curve.values[-1]) if whole else None


def _describe(
    group: str,
    baseline: str,
    crossings: Sequence[Crossing],
    curves: Sequence[Curve],
    paired: bool,
) -> str:
    goal = f"{baseline}'s final perplexity"
    count = len(crossings)
    missed = [c for c in crossings if c.by is None]
    if missed:
        trained = show_tokens(min(curve.tokens[-1] for curve in curves))
        who = group if count == 1 else f"{group} ({len(missed)} of {count} seeds)"
        return f"{who} does not reach {goal} within {trained} tokens."
    bracket = f"{show_tokens(min(c.after for c in crossings))} and " + show_tokens(
        max(c.by for c in crossings)
    )
    if any(c.tokens is None for c in crossings):
        return (
            f"{group} reaches {goal} somewhere between {bracket} tokens: it was evaluated too "
            "seldom to say where (lower eval_interval, set eval_first)."
        )
    if not any(c.tokens for c in crossings):
        return (
            f"{group} is at {goal} or below before any training: {baseline} has ended no better "
            "than that, and tokens compare nothing."
        )
    mean = statistics.fmean(c.tokens for c in crossings)
    share = estimate([c.tokens / c.baseline_tokens for c in crossings])
    text = (
        f"{group} reaches {goal} after {show_tokens(mean)} tokens, {100 * share.mean:.0f} % of "
        f"{baseline}'s {show_tokens(crossings[0].baseline_tokens)}, interpolated between its "
        f"evaluations at {bracket}"
    )
    if share.low is not None:
        low, high = 100 * max(0.0, share.low), 100 * share.high
        text += f"; 95 % interval over {count} seeds {low:.0f} to {high:.0f} %"
        return f"{text}." if paired else f"{text}, without what {baseline} varies by itself."
    return f"{text}; one seed, so without an interval."


def show_tokens(count: float) -> str:
    """A number of tokens for people: `7.86 B`, `614.4 k`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}"
