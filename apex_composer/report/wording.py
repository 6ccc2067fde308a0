"""The answer in words: never more than the numbers hold."""

import math
from collections.abc import Iterator, Mapping, Sequence

from apex_composer.report.crossings import TOTAL, Reach
from apex_composer.report.ends import about_ends, is_at_its_end
from apex_composer.report.estimates import Estimate
from apex_composer.report.finals import Final, are_paired, predicted_tokens, same_text
from apex_composer.report.groups import (
    APEX,
    Group,
    differing,
    differing_seeds,
    has_apex,
    is_below,
    methods_of,
    same_start,
)
from apex_composer.report.speeds import Speed

MOST = 8  # names of settings in a sentence
Finals = Mapping[str, Mapping[str, Final]]


def main_group(groups: Sequence[Group], baseline: Group | None) -> Group | None:
    """The one that the answer is about: with APEX if there is one, else the first that is none."""
    others = [group for group in groups if not group.baseline]
    with_apex = [group for group in others if has_apex(group)]
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
        why = _silent(group, baseline) or "they have no evaluation of the same held-out text."
        return f"{group.name} and {baseline.name} cannot be compared: {why}"
    domain = TOTAL if TOTAL in compared else compared[-1]
    where = "" if len(domains) == 1 or domain == TOTAL else f" on {domain}"
    final, other = own[domain], others[domain].perplexity.mean
    change, same = final.perplexity_difference.mean, ""
    if final.paired and len(group.runs) < len(baseline.runs):
        other = final.perplexity.mean - change  # of its runs that have a counterpart
        same = f" with the same {_seeds(len(group.runs))}"
    ended = is_at_its_end(group) and is_at_its_end(baseline)
    ends = "ends" if ended else "stands, before its end,"
    text = (
        f"{group.name} {ends} at a validation perplexity{where} of {_show(final.perplexity.mean)}, "
        f"{baseline.name}{same} at {_show(other)}"
    )
    if not math.isfinite(change):
        return f"{text}: a run has diverged, so there is no difference to give."
    text += f": a difference of {_change(change, other)}. {_judge(final)}"
    found = [r for r in reaches if (r.group, r.baseline) == (group.name, baseline.name)]
    return " ".join([text, *(r.text for r in found if r.domain == domain)])


def _silent(*groups: Group) -> str:
    """Runs beside others that were never evaluated; nothing where all were, or none of a group."""
    names = [
        run.name
        for group in groups
        for run in group.runs
        if not run.validation and any(other.validation for other in group.runs)
    ]
    if not names:
        return ""
    return f"{_some(names)} ha{'s' if len(names) == 1 else 've'} no evaluation. Leave it out."


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "seed"


def _judge(final: Final) -> str:
    interval = final.perplexity_difference
    if interval.low is None:
        return "Without several seeds of each, how much of that is chance cannot be said."
    kind = f"{len(interval.values)} pairs of seeds" if final.paired else "the seeds of both"
    text = f"The 95 % interval over {kind} is {_signed(interval.low)} to "
    text += _signed(interval.high)
    if interval.low <= 0 <= interval.high:
        return f"{text}; it includes 0, so these runs show no difference."
    return f"{text}; it does not include 0."


def _without_comparison(groups: Sequence[Group], domains: Sequence[str], finals: Finals) -> str:
    domain = domains[-1] if domains else None
    ends = [
        f"{group.name} at {_with_interval(finals[group.name][domain].perplexity)}"
        for group in groups
        if domain in finals[group.name]
    ]
    if not ends:
        return "No run has evaluated held-out text, so there is no perplexity to compare."
    where = "" if domain == TOTAL or len(domains) == 1 else f" on {domain}"
    verb = " ends" if all(map(is_at_its_end, groups)) else ", before the end, is"
    text = f"Validation perplexity{where}{verb} for {', '.join(ends)}."
    if len(groups) == 1:
        count = len(groups[0].runs)
        there = "there is one run" if count == 1 else f"these are {count} seeds of one run"
        return f"{text} It is compared with nothing: {there}."
    return f"{text} Nothing says which run is the baseline: name it with --baseline."


def find_cautions(
    groups: Sequence[Group],
    baseline: Group | None,
    domains: Sequence[str],
    finals: Finals,
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
        fewer = [
            g.name for g in groups if len(g.runs) < len(baseline.runs) and are_paired(g, baseline)
        ]
        if fewer:
            yield (
                f"Of fewer seeds than {baseline.name}, so that their differences are to its runs "
                f"of the same seeds: {_some(fewer)}."
            )
    yield from about_ends(groups, baseline)
    for group in groups:
        if group is not baseline or len(groups) == 1:
            yield from _about_text(group, baseline or group, domains)
        if _diverged(group, finals):
            yield f"{group.name} has diverged: its last loss on held-out text is no number."
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
        elif _one_order(one):
            yield (
                f"All seeds of {one.name} read the data in one order (shuffle_seed): its interval "
                "is without what another order changes."
            )
    if seeds := differing_seeds(group, baseline):
        yield (
            f"{group.name} and {baseline.name} have other seeds ({', '.join(seeds)}), so they are "
            "no pairs: the difference is also one of data order and of what is drawn."
        )
    if not (group.runs[0].settings and baseline.runs[0].settings):
        yield "Not all settings are known: the runs may differ in more than is shown."
        return
    own = methods_of(group)
    different = [k for k in differing([group, baseline]) if not any(is_below(k, m) for m in own)]
    if different and (own or len(different) > 1):
        method = "APEX" if APEX in own else ", ".join(m.rsplit(".", 1)[-1] for m in own)
        more = f"in more than {method}" if own else f"in {len(different)} settings"
        yield f"{group.name} and {baseline.name} differ {more}: {_some(different)}."


def _about_text(group: Group, baseline: Group, domains: Sequence[str]) -> Iterator[str]:
    """A group that evaluates other text than the baseline, or than its own runs."""
    who = f"{group.name} and {baseline.name}" if group is not baseline else f"runs of {group.name}"
    found = []
    for domain in domains:
        counts = predicted_tokens(group, baseline, domain)
        if len(counts) > 1:
            told = " and ".join(f"{count:,}" for count in counts)
            found.append(f"{domain} has {told} predicted tokens")
    if found:
        yield f"{who} evaluate different text: {_some(found)}."
    elif not same_text(group, baseline, TOTAL):
        yield f"{who} evaluate different domains: no total."


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MOST} more, all below"] if len(names) > MOST else []
    return ", ".join([*names[:MOST], *more])


def _one_order(group: Group) -> bool:
    settings = [run.settings for run in group.runs]
    keys = [key for key in settings[0] if key.rsplit(".", 1)[-1] == "shuffle_seed"]
    return any(len({str(own.get(key)) for own in settings}) == 1 for key in keys)


def _diverged(group: Group, finals: Finals) -> bool:
    return not all(math.isfinite(final.loss.mean) for final in finals[group.name].values())


def _with_interval(found: Estimate) -> str:
    if found.low is None:
        return _show(found.mean)
    return f"{_show(found.mean)} (95 % interval {_show(found.low)} to {_show(found.high)})"


def _show(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3g}"


def _signed(change: float) -> str:
    is_plain = change == 0 or 5e-4 <= abs(change) < 1e6
    return f"{change:+.3f}" if is_plain else f"{change:+.2g}"


def _change(change: float, reference: float) -> str:
    """`-0.002 (less than 0.01 %)`: no rounding to a signed zero."""
    share = 100 * change / reference
    percent = f"{share:+.2f} %" if abs(share) >= 0.005 or not share else "less than 0.01 %"
    tiny = 0 < abs(change) < 5e-4
    return f"{'less than 0.001' if tiny else _signed(change)} ({percent})"
