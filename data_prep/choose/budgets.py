"""Budgets of tokens: what each domain gives, and whether it can."""

import math
from collections.abc import Mapping

from apex_composer.data_prep.choose.estimate import Estimate
from apex_composer.data_prep.choose.proportions import share_out, some_of
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options

# Above this part of the corpus the rest is not worth leaving out.
LARGEST_PART = 0.6
# Standard deviations of the number of documents that are kept beyond the expected ones.
SCATTER = 6
# The same for the documents of the sample, from which their number was estimated.
SAMPLE_SCATTER = 3
# A budget of this many times the estimate is refused at once, and by a dry run, which says what to
# expect, one of this many times.
HOPELESS, DOUBTFUL = 2.0, 1.3


def parts_for_budgets(estimates: dict[str, Estimate], options: Options) -> dict[str, float]:
    """Part of every domain's documents that the budgets need, with the margin.

    Args:
        options: those of a preparation in which no split takes all that is left.
    """
    wanted = wanted_tokens(options, list(estimates))
    parts = {}
    for domain, estimate in estimates.items():
        tokens = sum(split[domain] for split in wanted.values())
        part = options.estimate_margin * tokens / max(1.0, estimate.tokens)
        part *= 1 + SAMPLE_SCATTER / math.sqrt(max(1, estimate.sampled))
        # Few documents scatter around their mean; lengths with a long tail do so widely.
        expected = part * estimate.documents
        part += SCATTER * math.sqrt(expected + 1) / max(1.0, estimate.documents)
        parts[domain] = part if part < LARGEST_PART else 1.0
    return parts


def wanted_tokens(options: Options, domains: list[str]) -> dict[str, dict[str, int] | None]:
    """Tokens of every budget, whole sequences only, in the order in which the hashes fill them.

    Args:
        domains: names of the domains, sorted.

    Returns:
        Per split: tokens per domain, or None for a split that takes all that is left.

    Raises:
        SettingsError: a domain has no proportion.
    """
    shares, _ = share_out(options.proportions, domains)
    length = options.sequence_length
    wanted: dict[str, dict[str, int] | None] = {}
    for name, budget in options.budgets.items():
        if budget is None:
            wanted[name] = None
        elif name == "validation" and options.val_per_domain:
            wanted[name] = dict.fromkeys(domains, budget // length * length)
        else:
            counts = divide_sequences(budget // length, shares)
            wanted[name] = {domain: count * length for domain, count in counts.items()}
    return wanted


def divide_sequences(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide a number of sequences among domains, to whole ones that add up to it.

    Args:
        total: sequences.
        shares: parts of the domains, adding up to 1.
    """
    counts = {domain: int(total * share) for domain, share in shares.items()}
    # The largest remainders first; equal ones in the domains' order, so that it is deterministic.
    by_remainder = sorted(shares, key=lambda domain: counts[domain] - total * shares[domain])
    for domain in by_remainder[: max(0, total - sum(counts.values()))]:
        counts[domain] += 1
    return counts


def check_budgets(options: Options, domains: list[str]) -> None:
    """Refuse budgets of which some domain gets no whole sequence, before anything is tokenised.

    Args:
        domains: names of the domains that are known.

    Raises:
        SettingsError: a domain gets none; the message names every one.
    """
    empty = [
        f"{split}/{domain}"
        for split, tokens in wanted_tokens(options, domains).items()
        for domain, count in (tokens or {}).items()
        if count == 0
    ]
    if empty:
        raise SettingsError(
            f"The budgets leave no sequence of {options.sequence_length} tokens for "
            f"{some_of(empty)}. Raise them (val_tokens={options.val_tokens}, train_tokens="
            f"{options.train_tokens}, cpt_tokens={options.cpt_tokens}), take these domains out, "
            "give them larger proportions, or use --val-per-domain."
        )


def check_enough(
    wanted: dict[str, dict[str, int]], estimates: dict[str, Estimate], factor: float
) -> None:
    """Refuse budgets of more than a number of times what by the estimate is there.

    Args:
        wanted: tokens per split and domain.
        factor: what the estimate may be wrong by.

    Raises:
        ValueError: a domain has too little; the message names every one.
    """
    sums = {domain: sum(split[domain] for split in wanted.values()) for domain in estimates}
    short = [
        f"{domain}: {sums[domain]:,} tokens are wanted, about {round(e.tokens):,} are there"
        for domain, e in estimates.items()
        if sums[domain] > factor * e.tokens
    ]
    if short:
        raise ValueError(
            f"Too little text: {'; '.join(short)}. Add text, lower the budgets, or change "
            "--proportions."
        )
