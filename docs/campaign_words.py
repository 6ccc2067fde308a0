"""The sentences of docs/results.md on a campaign: they say what its numbers say, and no more."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import correlation, fmean
from typing import Any

from base_words import times_read
from reproduce.comparisons import Runs, difference, is_conventional, loss, training_difference
from reproduce.noise import DELTA, Noise, noise, training_scatter
from reproduce.summary import Study
from reproduce.tables import show

from apex_composer.report.crossings import find_crossing
from apex_composer.report.estimates import Estimate, estimate, t_quantile
from apex_composer.report.run import Curve

# Perplexities after each stage, at a constant rate and with APEX (paper, table 2).
PAPER = ((5.87, 5.75), (5.85, 5.55), (5.83, 5.44))
FEWEST_RANKED = 8  # arms, for a rank correlation
PAPER_SHARE = 33  # % of the tokens after which APEX is as good as the constant rate


def signed(value: float, digits: int = 3) -> str:
    """A published difference, or another number with its sign; nothing is a plain 0."""
    return f"{value:+.{digits}f}".replace("-", "−") if value else "0"


def in_words(stagewise: Runs, apex: Runs) -> str:
    """What the pairs at equal rates say, and how sure that is."""
    first, last = (difference(apex, stagewise, apex.ends[place]) for place in (1, -1))
    if first is None or last is None:
        return "APEX and plain training at its rates have no seeds in common yet.\n"
    if not (math.isfinite(first.mean) and math.isfinite(last.mean)):
        return "A run of APEX or of plain training at its rates has diverged: no difference.\n"
    stage = "its only stage" if len(apex.ends) == 2 else "the first stage"
    text = (
        f"At equal rates, APEX minus plain training is {show(first)} nats after {stage} "
        f"({judge(first, math.log(PAPER[0][1] / PAPER[0][0]))})"
    )
    if len(apex.ends) > 2:
        text += f" and {show(last)} at the end ({judge(last)})"
    count = len(last.values)
    lines = [f"{text}; {count} pair{'s' * (count > 1)} of seeds.", *reach_in_words(last)]
    lines += training_in_words(stagewise, apex)
    lines += domains_in_words(stagewise, apex)
    lines += chance_in_words(stagewise, noise([(apex, stagewise)]))
    return "\n".join([*lines, ""])


def judge(found: Estimate, paper: float | None = None) -> str:
    """What an interval includes: no difference, and the paper's."""
    if found.low is None:
        return "one seed, so without an interval"
    if not any(found.values):
        return "equal in every bit"
    excludes = not found.low <= 0 <= found.high
    text = "the interval excludes 0" if excludes else "the interval includes 0"
    if paper is not None:
        inside = found.low <= paper <= found.high
        text += f" and {'includes' if inside else 'excludes'} the paper's {signed(paper)}"
    return text


def reach_in_words(found: Estimate) -> Iterator[str]:
    """How small a difference these pairs could have told from none."""
    if found.high is not None and any(found.values):
        freedom = len(found.values) - 1
        yield (
            f"As these pairs scatter, with {freedom} degree{'s' * (freedom > 1)} of freedom, a "
            f"difference below {found.high - found.mean:.5f} nats cannot be told from none."
        )


def training_in_words(stagewise: Runs, apex: Runs) -> Iterator[str]:
    """What the batches say that both were trained on, each before its step."""
    found = [training_difference(apex, stagewise, stage) for stage in range(len(apex.ends) - 1)]
    if None in found:
        return
    each = ", ".join(map(show, found))
    yield (
        f"On the text that they are trained on{times_read(apex.records[0], 'continued')}, every "
        f"batch before its step, APEX minus plain training is {each} in "
        f"{'its stages' if len(found) > 1 else 'its only stage'} ({judge(found[-1])}). These are "
        "other windows of the documents that are trained on; the mean is over tokens."
    )


def domains_in_words(stagewise: Runs, apex: Runs) -> Iterator[str]:
    """In how many pairs APEX is behind, domain by domain."""
    parts = []
    for domain in apex.records[0]["losses"][0]:
        found = difference(apex, stagewise, apex.ends[-1], [domain])
        behind = sum(value > 0 for value in found.values)
        each = ", ".join(show(estimate([value])) for value in found.values)
        parts.append(f"{behind} of {len(found.values)} on {domain} ({each})")
    yield f"By domain, APEX ends behind in {'; '.join(parts)}."


def chance_in_words(baseline: Runs, pairs: Noise) -> Iterator[str]:
    """How far runs scatter, and how many of them would show a small difference."""
    single = noise([(baseline, None)])
    if single.single is not None:
        yield (
            f"Runs of `{baseline.arm}` differ by {single.single:.5f} nats between seeds (standard "
            f"deviation, {_freedom(single.single_freedom)}; published for 124M: 0.0013)."
        )
    if pairs.paired is not None:
        yield (
            f"Pairs of runs differ by {pairs.paired:.5f} ({_freedom(pairs.paired_freedom)}): if "
            f"that is their scatter, {pairs.seeds} pairs show {DELTA} nats (95 %, power 80 %)."
        )


def lowest_in_words(study: Study, stagewise: Runs) -> Iterator[str]:
    """Which arm ends lowest, and which of those that select units: what a preset had to beat."""
    found = [
        (runs, base or stagewise, difference(runs, base or stagewise, runs.ends[-1]))
        for runs, base in study.arms
    ]
    known = [own for own in found if own[2] is not None and math.isfinite(own[2].mean)]
    selecting = [own for own in known if own[0].settings["apex"] is not None]
    if not selecting or len(known) == len(selecting) + 1:
        return
    best, other = (min(own, key=lambda one: one[2].mean) for own in (known, selecting))
    text = f"Lowest at the end is `{best[0].arm}`"
    if best[0].arm != stagewise.arm:
        text += f", {show(best[2])} against `{best[1].arm}`"
    if other is not best:
        text += f"; of the arms that select units `{other[0].arm}`, {show(other[2])}"
        text += f" against `{other[1].arm}`"
    yield f"{text}.\n"


def lone_pairs_in_words(studies: Sequence[Study], mains: Sequence[Study]) -> Iterator[str]:
    """What single pairs, which have no interval, say: which arms that select units differ by more
    than chance from plain training.

    Args:
        studies: of one base.
        mains: the paper's comparison on bases of its kind, whose pairs of APEX say how far pairs
            scatter; where there is none those of the studies themselves do.
    """
    arms = [pair for study in studies for pair in study.arms]
    if all(base is None or len(_seeds(runs, base)) > 1 for runs, base in arms):
        return
    pairs = [pair for main in mains for pair in main.arms] or arms
    known = [pair for pair in pairs if _expands(pair[0])]  # other rates scatter more
    held_out, training = noise(known), training_scatter(known)
    text = "An arm with one seed has no interval"
    if held_out.paired is None:
        yield f"{text}, and how far pairs scatter from this base is not known yet.\n"
        return
    reach = t_quantile(held_out.paired_freedom) * held_out.paired
    whose = "APEX in the paper's comparison" if mains else "the others"
    lines = [
        f"{text}: if its pair scatters at the end as those of {whose} do ({held_out.paired:.5f}, "
        f"{_freedom(held_out.paired_freedom)}), differences above {reach:.5f} nats are more than "
        f"chance (95 %, one comparison; all are against one run). "
        f"{_beyond('end', arms, reach, lambda *pair: difference(*pair, pair[0].ends[-1]))}"
    ]
    if training[0] is not None:
        reach = t_quantile(training[1]) * training[0]
        lines.append(
            f"On the training text of the last stage those above {reach:.5f} are "
            f"({training[0]:.6f}, {_freedom(training[1])}). "
            f"{_beyond('are', arms, reach, training_difference)}"
        )
    yield "\n".join([*lines, ""])


def growth_in_words(arms: Sequence[tuple[Runs, Runs | None]]) -> Iterator[str]:
    """Whether arms end the higher the larger their operators grow, in ranks; splitting left out."""
    shares, ends = [], []
    for runs, base in arms:
        share = fmean(largest_share(record["stages"])["relative_norm"] for record in runs.records)
        if base is not None and share and "split" not in runs.settings["variation"]:
            shares.append(share)
            ends.append(difference(runs, base, runs.ends[-1]).mean)
    if len(shares) >= FEWEST_RANKED and all(map(math.isfinite, ends)):
        yield (
            "Rank correlation of the difference at the end with operators' largest share of their "
            f"rows: {signed(correlation(_ranks(shares), _ranks(ends)), 2)} ({len(shares)} arms).\n"
        )


def largest_share(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The facts of the stage in which operators became largest, with a share in any case."""
    return max(
        ({"relative_norm": 0.0} | dict(stage) for stage in stages),
        key=lambda stage: stage["relative_norm"],
    )


def _ranks(values: Sequence[float]) -> list[int]:
    return [sorted(values).index(value) for value in values]


def _expands(runs: Runs) -> bool:
    """Whether it trains all weights and operators."""
    apex = runs.settings["apex"]
    return apex is not None and apex.get("expansion", True) and "trainable" not in apex


def _seeds(runs: Runs, base: Runs) -> set[int]:
    return set(runs.by_seed) & set(base.by_seed)


def _beyond(
    verb: str,
    arms: Sequence[tuple[Runs, Runs | None]],
    reach: float,
    measure: Callable[[Runs, Runs], Estimate | None],
) -> str:
    """Which arms that select units are lower and higher than plain training by more than chance."""
    lower, higher, count = [], [], 0
    for runs, base in arms:
        if base is None or runs.settings["apex"] is None or is_conventional(runs):
            continue
        own = measure(runs, base)
        if own is None or not math.isfinite(own.mean):
            continue
        count += 1
        width = reach if own.high is None else own.high - own.mean
        if abs(own.mean) > width:
            (lower if own.mean < 0 else higher).append(f"`{runs.arm}`")
    parts = [
        f"{len(names)} {verb} {word} than plain training by more{': ' if names else ''}"
        f"{', '.join(names)}"
        for word, names in (("lower", lower), ("higher", higher))
    ]
    return f"Of {count} arms that select units {'; '.join(parts)}."


def _freedom(count: int) -> str:
    return f"{count} degree{'s' * (count > 1)} of freedom"


def decay_in_words(constant: Runs, stagewise: Runs, apex: Runs) -> str:
    """What the constant rate's own arm adds: the paper's comparison."""
    decay = difference(stagewise, constant, apex.ends[-1])
    if decay is None:
        return "The constant rate and plain training with decay have no seeds in common yet.\n"
    lines = [f"Decay alone changes the loss by {show(decay)} at the end ({judge(decay)})."]
    shares = [share(runs, constant) for runs in (stagewise, apex)]
    if None in shares:
        lines.append(
            "The constant rate ends no better than the base: when others reach its last loss says "
            f"nothing (the paper's APEX does after {PAPER_SHARE} % of the tokens)."
        )
    else:
        lines.append(
            f"The constant rate's last loss is reached by plain training with decay {shares[0]}, "
            f"by APEX {shares[1]} (paper: {PAPER_SHARE} %), interpolated between ends of stages."
        )
    return "\n".join([*lines, ""])


def share(runs: Runs, target: Runs) -> str | None:
    """Of the target's batches, those after which a run stays at its last loss or below.

    Returns:
        None where a run of the target has ended no better than the base.
    """
    shares, missed = [], 0
    for seed in sorted(set(runs.by_seed) & set(target.by_seed)):
        curves = [_mean_curve(own.by_seed[seed]) for own in (runs, target)]
        goal = curves[1].values[-1]
        if not goal < curves[1].values[0]:
            return None
        found = find_crossing(curves[0], goal)[0]
        missed += found is None
        shares.append(100 * (found or 0) / target.ends[-1])
    if missed:
        return f"never in {missed} of {len(shares)} seeds"
    return f"after {fmean(shares):.0f} % of the batches" if shares else "in no run of equal seed"


def _mean_curve(record: Mapping[str, Any]) -> Curve:
    ends = [0, *record["stage_ends"]]
    return Curve(ends, ends, [loss(record, place) for place in range(len(ends))])
