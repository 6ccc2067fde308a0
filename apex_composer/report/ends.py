"""Where runs were evaluated last, and whether that is their end: they may have died on the way."""

import re
from collections.abc import Iterator, Sequence

from apex_composer.report.crossings import show_tokens
from apex_composer.report.groups import Group
from apex_composer.report.run import Run

# Of durations in epochs or samples a run does not say how far it has come.
UNITS = {"ba": "batches", "tok": "tokens"}


def is_at_its_end(group: Group) -> bool:
    """Whether all its runs were evaluated at `max_duration`, as far as that can be told."""
    return not any(_short(run) for run in group.runs)


def about_ends(groups: Sequence[Group], baseline: Group | None) -> Iterator[str]:
    """Groups whose last evaluations are elsewhere than the baseline's, or than those of the first
    group, and groups that are not at their end."""
    reference = baseline or groups[0]
    for group in groups:
        if group is reference and len(groups) > 1:
            continue
        own, other = _ends(group), _ends(reference)
        if own and other and len({*own, *other}) > 1:
            beside = "" if group is reference else f", {reference.name} at {_span(other)}"
            yield f"{group.name} was evaluated last at {_span(own)}{beside}."
    for group in groups:
        short = [text for text in map(_short, group.runs) if text]
        if short:
            count = f" in {len(short)} of {len(group.runs)} runs" if len(group.runs) > 1 else ""
            yield f"{group.name} is not at its end: evaluated last at {short[0]}{count}."


def _short(run: Run) -> str:
    """How far a run has come that was not evaluated at its end; nothing for one that was."""
    asked = re.fullmatch(r"([\d_]+)(ba|tok)", str(run.settings.get("max_duration")))
    if asked is None:
        return ""
    total, unit = int(asked[1].replace("_", "")), UNITS[asked[2]]
    done = _last(run, unit)
    if done is None or done >= total:
        return ""
    show = show_tokens if unit == "tokens" else "{:,}".format
    return f"{show(done)} of {show(total)} {unit}"


def _last(run: Run, unit: str) -> int | None:
    """Tokens or batches of a run's last evaluation; None where it had none, or counts no tokens."""
    curves = [curve for curve in run.validation.values() if curve.values]
    found = [curve.tokens if unit == "tokens" else curve.batches for curve in curves]
    return min((places[-1] for places in found if places and places[-1]), default=None)


def _ends(group: Group) -> list[tuple[int, str]]:
    """Tokens, or where they are not counted batches, of each run's last evaluation."""
    ends = []
    for run in group.runs:
        found = [(_last(run, unit), unit) for unit in ("tokens", "batches")]
        ends += [end for end in found if end[0] is not None][:1]
    return sorted(ends)


def _span(ends: Sequence[tuple[int, str]]) -> str:
    first, last = ends[0], ends[-1]
    begin = "" if first == last else f"{show_tokens(first[0])} to "
    return f"{begin}{show_tokens(last[0])} {last[1]}"
