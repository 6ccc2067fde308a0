"""The sentences of docs/results.md on a campaign: they say what its numbers say, and no more."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from reproduce.comparisons import Record, Runs, difference, is_conventional, loss
from reproduce.noise import DELTA, Noise, noise
from reproduce.summary import Study
from reproduce.tables import show

from apex_composer.report.crossings import find_crossing
from apex_composer.report.estimates import Estimate, estimate, t_quantile
from apex_composer.report.run import Curve

# Perplexities after each stage, at a constant rate and with APEX (paper, table 2).
PAPER = ((5.87, 5.75), (5.85, 5.55), (5.83, 5.44))
PAPER_SHARE = 33  # % of the tokens after which APEX is as good as the constant rate


# What the bases are beside `mixture`, which was trained on all of the text that arms go on with.
BASES = {
    "scratch": "random weights, on which APEX's first stage is conventional (paper C.3)",
    "shift": "trained on code (github), and continued on documentation and packages",
    "context": "trained with windows of half the length",
    "superfluous": "`mixture`, trained on while an eighth of its units, those of lowest norm, are "
    "held at a hundredth of what they handed on: units that masking does not miss",
}


def signed(nats: float) -> str:
    """A published difference; nothing is a plain 0."""
    return f"{nats:+.3f}".replace("-", "−") if nats else "0"


def start_in_words(study: Study) -> Iterator[str]:
    """What the base had come to, whether its learning rate rises again, and who ends below it."""
    one = study.records[0]
    if kind := BASES.get(one["settings"]["base"]):
        yield f"This base: {kind}."
    scale = one["scale"]
    start, batch = loss(one, 0), scale["batch"] * scale["sizes"]["length"]
    read = one["base_batches"] * batch / 1e6
    yield f"The base had read {read:,.1f} M tokens; its loss is {start:.4f} nats."
    if one["base_batches"] and "base_end" in scale:
        ended, goes_on = scale["base_rate"] * scale["base_end"], scale["rate"] * scale["rates"][0]
        rises = ", which warms it up again" if goes_on > ended else ""
        yield f"Its learning rate had ended at {ended:g}; the arms go on at {goes_on:g}{rises}."
    ends = [fmean(loss(record, -1) for record in runs.records) for runs, _ in study.arms]
    above = sum(not end <= start for end in ends)
    text = f"The loss of {above} of {len(ends)} arms ends above the base's"
    if above == len(ends) > 1:
        text += ": none is better than what it went on from"
    yield f"{text}.\n"


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


def domains_in_words(stagewise: Runs, apex: Runs) -> Iterator[str]:
    """In how many pairs APEX is behind, domain by domain."""
    parts = []
    for domain in apex.records[0]["losses"][0]:
        found = difference(apex, stagewise, apex.ends[-1], domain)
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
    found = [(runs, difference(runs, stagewise, runs.ends[-1])) for runs, _ in study.arms]
    known = [(runs, own) for runs, own in found if own is not None and math.isfinite(own.mean)]
    selecting = [pair for pair in known if pair[0].settings["apex"] is not None]
    if not selecting or len(known) == len(selecting) + 1:
        return
    (best, lowest), (other, second) = (
        min(pairs, key=lambda pair: pair[1].mean) for pairs in (known, selecting)
    )
    text = f"Lowest at the end is `{best.arm}`"
    if best.arm != stagewise.arm:
        text += f", {show(lowest)} against `{stagewise.arm}`"
    if other is not best:
        text += f"; of the arms that select units `{other.arm}`, {show(second)}"
    yield f"{text}.\n"


def lone_pairs_in_words(studies: Sequence[Study], mains: Sequence[Study]) -> Iterator[str]:
    """What single pairs, which have no interval, say: which arms with APEX differ by more than
    chance from plain training.

    Args:
        studies: of one base.
        mains: the paper's comparison on bases of its kind, whose pairs of APEX by rank say how far
            pairs scatter; where there is none those of the studies themselves do.
    """
    arms = [pair for study in studies for pair in study.arms]
    if all(base is None or len(runs.by_seed) > 1 for runs, base in arms):
        return
    ranked = [pair for main in mains for pair in main.arms if pair[0].arm == "apex_rank"]
    found = noise(ranked or arms)
    text = "An arm with one seed has no interval"
    if found.paired is None:
        yield f"{text}, and how far pairs scatter from this base is not known yet.\n"
        return
    reach = t_quantile(found.paired_freedom) * found.paired
    whose = "those of `apex_rank`" if ranked else "the others"
    yield (
        f"{text}: if its pair scatters at the end as {whose} do ({found.paired:.5f}, "
        f"{_freedom(found.paired_freedom)}), differences above {reach:.5f} nats are more than "
        f"chance (95 %). {_beyond(arms, reach)}\n"
    )


def _beyond(arms: Sequence[tuple[Runs, Runs | None]], reach: float) -> str:
    """Which arms with APEX end lower and higher than their baselines by more than chance."""
    lower, higher, count = [], [], 0
    for runs, base in arms:
        if base is None or runs.settings["apex"] is None or is_conventional(runs):
            continue
        own = difference(runs, base, runs.ends[-1])
        if not math.isfinite(own.mean):
            continue
        count += 1
        width = reach if own.high is None else own.high - own.mean
        if abs(own.mean) > width:
            (lower if own.mean < 0 else higher).append(f"`{runs.arm}`")
    parts = [
        f"{len(names)} end {word} than plain training by more{': ' if names else ''}"
        f"{', '.join(names)}"
        for word, names in (("lower", lower), ("higher", higher))
    ]
    return f"Of {count} arms with APEX {'; '.join(parts)}."


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


def masked_in_words(records: Sequence[Record]) -> list[str]:
    """What a tenth of the base's units is worth, where a run has measured it."""
    found = [own["stages"][0]["masked"] for own in records if "masked" in own["stages"][0]]
    if not found:
        return []
    cost = {
        which: f"{fmean(own[which] - own['whole'] for own in found):.4f}"
        for which in ("lowest", "random", "top")
    }
    return [
        "Without the tenth of its units that has the lowest norms, this base's loss is "
        f"{cost['lowest']} nats higher, without a random tenth {cost['random']}, without the top "
        f"one {cost['top']} (paper, table 4, exact matches: 12.0 becomes 12.0, 11.5 and 0.0).\n"
    ]


def split_in_words(records: Sequence[Record]) -> Iterator[str]:
    """What dropping the weak units costs, and whether copies of the strong ones part from them."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        if "split_losses" in record["stages"][0]:
            arms.setdefault(record["arm"], []).append(record)
    for arm, own in arms.items():
        losses = [record["stages"][0]["split_losses"] for record in own]
        cost = fmean(one["after"] - one["before"] for one in losses)
        alike = fmean(record["stages"][-1]["split_similarity"] for record in own)
        yield (
            f"`{arm}`: as weak units become copies of strong ones the loss rises by {cost:.4f}; at "
            f"the end the cosine between the rows of both is {alike:.5f} (1: copies still).\n"
        )
