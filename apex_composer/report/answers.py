"""The answers that a report gives: which run is better, by how much, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from apex_composer.report.crossings import TOTAL, Crossing, Reach, find_reach
from apex_composer.report.estimates import Estimate
from apex_composer.report.finals import Final, all_domains, are_paired, find_final, same_text
from apex_composer.report.groups import (
    Group,
    differing,
    differing_versions,
    find_baselines,
    make_groups,
    same_start,
)
from apex_composer.report.run import Run
from apex_composer.report.speeds import Speed, measure
from apex_composer.report.wording import find_cautions, say_answer

__all__ = ["TOTAL", "Answer", "Crossing", "Estimate", "Final", "Group", "Reach", "Speed", "answer"]


@dataclass(frozen=True)
class Answer:
    """All that a report says in numbers and words.

    Attributes:
        sentence: the answer with its uncertainty, in a few sentences; claims no more than the
            numbers hold.
        cautions: what a reader must know before believing it, a sentence each.
        groups: in the order in which the runs were given, baselines included.
        baselines: names of groups, the one that differences are taken from first; may be empty.
        baseline_rule: how they were found, for people.
        domains: those that any run has evaluated, and `total` at the end where there is more than
            one and it is known.
        finals: by group name, then by domain; a domain that a group has not evaluated is absent.
        reaches: of each group and each baseline that begins with the same weights, in `total`, or
            by domain where that is unknown or not of the same text.
        settings: those that differ: key to the values in the order of the groups, as text.
        hidden: settings that differ and were left out: names and places.
        versions: packages that differ: name to the versions in the order of the groups.
        same_versions: those on which all agree.
        speeds: by group name.
        missing: what a run has not kept and why, by the runs' names; those without are absent.
    """

    sentence: str
    cautions: tuple[str, ...]
    groups: tuple[Group, ...]
    baselines: tuple[str, ...]
    baseline_rule: str
    domains: tuple[str, ...]
    finals: Mapping[str, Mapping[str, Final]]
    reaches: tuple[Reach, ...]
    settings: Mapping[str, tuple[str, ...]]
    hidden: tuple[str, ...]
    versions: Mapping[str, tuple[str, ...]]
    same_versions: Mapping[str, str]
    speeds: Mapping[str, Speed]
    missing: Mapping[str, tuple[str, ...]]


def answer(runs: Sequence[Run], baselines: Sequence[str] = ()) -> Answer:
    """Compare runs.

    Args:
        runs: as `read_runs` returns them.
        baselines: names of runs that the others are compared with, the most important first.
            Default: runs without APEX or another method that are as long as the first with one
            and begin with the same weights, the one first whose settings differ least.

    Raises:
        ValueError: no run has a name that `baselines` gives.
    """
    groups = make_groups(runs)
    names, rule = find_baselines(groups, baselines)
    groups = [replace(group, baseline=group.name in names) for group in groups]
    by_name = {group.name: group for group in groups}
    first = by_name[names[0]] if names else None
    domains = all_domains(groups)
    finals = {group.name: _finals(group, first, domains) for group in groups}
    reaches = _reaches(groups, [by_name[name] for name in names], domains)
    speeds = {group.name: measure(group) for group in groups}
    versions, same_versions = differing_versions(groups)
    return Answer(
        say_answer(groups, first, domains, finals, reaches),
        tuple(find_cautions(groups, first, domains, finals, speeds, versions)),
        tuple(groups),
        tuple(names),
        rule,
        domains,
        finals,
        reaches,
        differing(groups),
        tuple(differing(groups, hidden=True)),
        versions,
        same_versions,
        speeds,
        {run.name: tuple(run.missing) for run in runs if run.missing},
    )


def _finals(group: Group, baseline: Group | None, domains: Sequence[str]) -> dict[str, Final]:
    found = {domain: find_final(group, baseline, domain) for domain in domains}
    return {domain: final for domain, final in found.items() if final is not None}


def _reaches(
    groups: Sequence[Group], baselines: Sequence[Group], domains: Sequence[str]
) -> tuple[Reach, ...]:
    found = [
        find_reach(group, baseline, domain, are_paired(group, baseline))
        for baseline in baselines
        for group in groups
        if group.name != baseline.name and same_start(group, baseline)
        for domain in _comparable(group, baseline, domains)
    ]
    return tuple(reach for reach in found if reach is not None)


def _comparable(group: Group, baseline: Group, domains: Sequence[str]) -> list[str]:
    """The total where it is of the same text, else the domains that are."""
    same = [domain for domain in domains if same_text(group, baseline, domain)]
    return [TOTAL] if TOTAL in same else same
