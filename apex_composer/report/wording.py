"""The answer in words: never more than the numbers hold."""

from collections.abc import Iterator, Mapping, Sequence

from apex_composer.report.crossings import TOTAL, Reach, show_tokens, validation_curve
from apex_composer.report.finals import Final, same_validation
from apex_composer.report.groups import Group, differing, same_start
from apex_composer.report.speeds import Speed

Finals = Mapping[str, Mapping[str, Final]]


def main_group(groups: Sequence[Group], baseline: Group | None) -> Group | None:
    """The one that the answer is about: with APEX if there is one, else the first that is none."""
    others = [group for group in groups if not group.baseline]
    with_apex = [group for group in others if _has_apex(group)]
    others = with_apex or others or [group for group in groups if group is not baseline]
    return others[0] if others else None


def say_answer(
    groups: Sequence[Group],
    baseline: Group | None,
    domains: Sequence[str],
    finals: Finals,
    reaches: Sequence[Reach],
) -> str:
    """What the first comparison says, with its uncertainty."""
    group = main_group(groups, baseline)
    if baseline is None or group is None:
        return _without_comparison(groups, domains, finals)
    own, others = finals[group.name], finals[baseline.name]
    compared = [d for d in reversed(domains) if d in own and own[d].loss_difference is not None]
    if not compared:
        return (
            f"{group.name} and {baseline.name} cannot be compared: they have no evaluation of the "
            "same held-out text."
        )
    domain = TOTAL if TOTAL in compared else compared[-1]
    where = "" if len(domains) == 1 or domain == TOTAL else f" on {domain}"
    final, other = own[domain], others[domain]
    change = final.perplexity_difference.mean
    text = (
        f"{group.name} ends at a validation perplexity{where} of {final.perplexity.mean:.3f}, "
        f"{baseline.name} at {other.perplexity.mean:.3f}: a difference of {change:+.3f} "
        f"({100 * change / other.perplexity.mean:+.2f} %). {_judge(final)}"
    )
    found = [r for r in reaches if (r.group, r.baseline) == (group.name, baseline.name)]
    return " ".join([text, *(r.text for r in found if r.domain == domain)])


def _judge(final: Final) -> str:
    interval = final.perplexity_difference
    if interval.low is None:
        return "Without several seeds of each, how much of that is chance cannot be said."
    kind = f"{len(interval.values)} pairs of seeds" if final.paired else "the seeds of both"
    text = f"The 95 % interval over {kind} is {interval.low:+.3f} to {interval.high:+.3f}"
    if interval.low <= 0 <= interval.high:
        return f"{text}; it includes 0, so these runs show no difference."
    return f"{text}; it does not include 0."


def _without_comparison(groups: Sequence[Group], domains: Sequence[str], finals: Finals) -> str:
    domain = domains[-1] if domains else None
    ends = [
        f"{group.name} at {finals[group.name][domain].perplexity.mean:.3f}"
        for group in groups
        if domain in finals[group.name]
    ]
    if not ends:
        return "No run has evaluated held-out text, so there is no perplexity to compare."
    where = "" if domain == TOTAL or len(domains) == 1 else f" on {domain}"
    text = f"Validation perplexity{where} ends for {', '.join(ends)}."
    if len(groups) == 1:
        return f"{text} It is compared with nothing: there is one run."
    return f"{text} Nothing says which run is the baseline: name it with --baseline."


def find_cautions(
    groups: Sequence[Group],
    baseline: Group | None,
    domains: Sequence[str],
    speeds: Mapping[str, Speed],
    versions: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """What a reader must know before believing the answer."""
    if baseline is not None:
        group = main_group(groups, baseline)
        if group is not None:
            yield from _about_pair(group, baseline)
        for other in groups:
            if other is not baseline and not same_start(other, baseline):
                yield (
                    f"{other.name} begins with other weights than {baseline.name}, by its "
                    "settings: their tokens are not compared."
                )
            if not same_validation(other, baseline):
                yield f"{other.name} and {baseline.name} evaluate different text: no total."
    if len(groups) > 2 and any(len(group.runs) > 1 for group in groups):
        yield "Each interval is for one comparison: of twenty, one misses by chance."
    if len(domains) > 1 and TOTAL not in domains:
        yield "There is no total: the numbers of validation tokens are not known."
    if len({speed.device for speed in speeds.values()}) > 1:
        yield "The runs had different devices: their speeds cannot be compared."
    if versions:
        yield f"The runs had different versions of {', '.join(versions)}."


def _about_pair(group: Group, baseline: Group) -> Iterator[str]:
    for one in (group, baseline):
        if len(one.runs) == 1:
            yield f"{one.name} has one seed: another may give another result."
    different = [k for k in differing([group, baseline]) if not k.startswith("algorithms.apex")]
    if different and _has_apex(group):
        yield (
            f"{group.name} and {baseline.name} differ in more than APEX: {', '.join(different)}."
        )
    if not (group.runs[0].settings and baseline.runs[0].settings):
        yield "Not all settings are known: the runs may differ in more than is shown."
    ends = [_end(one) for one in (group, baseline)]
    if None not in ends and ends[0] != ends[1]:
        yield (
            f"{group.name} was evaluated last at {show_tokens(ends[0])} tokens, {baseline.name} "
            f"at {show_tokens(ends[1])}."
        )


def _end(group: Group) -> int | None:
    curves = [validation_curve(run, d) for run in group.runs for d in run.validation]
    tokens = [curve.tokens[-1] for curve in curves if curve and curve.tokens]
    return min(tokens) if tokens else None


def _has_apex(group: Group) -> bool:
    run = group.runs[0]
    return bool(run.stages) or any(key.startswith("algorithms.apex") for key in run.settings)
