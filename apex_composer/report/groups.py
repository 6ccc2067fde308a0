"""Which runs belong together, which are the baselines, and in what their settings differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from apex_composer.report.run import Run

# Names, places and what is shown: they must differ, or say nothing of the numbers.
HIDDEN_NAMES = ("run_name", "save_folder", "save_overwrite", "save_filename", "autoresume")
SHOWN = ("progress_bar", "log_to_console", "console_log_interval", "log_config", "python_log_level")
HIDDEN_SECTIONS = ("variables", "loggers", "metadata")  # variables: where they are used they count
# What a run begins with.
ORIGIN = ("load_path", "model.pretrained", "model.pretrained_model_name_or_path")
# Runs without one of them are conventional; all but the last are this project's algorithms.
APEX = "algorithms.apex"
NAMES = ("act_regu", "ema", "gmt", "hft", "relora", "rmt", "s2ft")
METHODS = (APEX, *(f"algorithms.{name}" for name in NAMES), "model.peft_config")
NOT_SET = "not set"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only.

    Attributes:
        name: the runs' name.
        runs: one for each seed, in the order of the seeds.
        seeds: the runs' settings `seed`; None where a run has kept no settings.
        baseline: whether others are compared with it.
    """

    name: str
    runs: tuple[Run, ...]
    seeds: tuple[int | None, ...]
    baseline: bool


def is_seed(key: str) -> bool:
    """Whether a flat key is a seed."""
    last = key.rsplit(".", 1)[-1]
    return last == "seed" or last.endswith("_seed")


def is_hidden(key: str) -> bool:
    """Whether a flat key is a name, a place or a matter of display."""
    first, last = key.split(".", 1)[0], key.rsplit(".", 1)[-1]
    return last in HIDDEN_NAMES or first in (*SHOWN, *HIDDEN_SECTIONS)


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in seeds, names and places only, each seed once.

    A run without settings, or with a seed that its group has already, begins a group of its own.
    """
    groups: list[list[Run]] = []
    for run in runs:
        own = next((g for g in groups if _belongs(run, g)), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    return [
        Group(name, *_in_order(own), False)
        for name, own in zip(_names(groups), groups, strict=True)
    ]


def _belongs(run: Run, group: Sequence[Run]) -> bool:
    seeds = [other.settings.get("seed") for other in group]
    same = bool(run.settings) and _settings(run) == _settings(group[0])
    return same and run.settings.get("seed") not in seeds


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.settings.items() if not is_seed(k) and not is_hidden(k)}


def _in_order(runs: Sequence[Run]) -> tuple[tuple[Run, ...], tuple[int | None, ...]]:
    ordered = sorted(runs, key=lambda run: run.settings.get("seed") or 0)
    return tuple(ordered), tuple(run.settings.get("seed") for run in ordered)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The settings' run_name where that tells the groups apart, else the first run's name."""
    names = [str(own[0].settings.get("run_name") or own[0].name) for own in groups]
    return [
        name if names.count(name) == 1 else own[0].name
        for name, own in zip(names, groups, strict=True)
    ]


def find_baselines(groups: Sequence[Group], given: Sequence[str]) -> tuple[list[str], str]:
    """Names of the groups that others are compared with, the first one first, and why these.

    Args:
        given: names of groups or of their runs.

    Raises:
        ValueError: a given name is none.
    """
    if given:
        return [_find(groups, name) for name in given], "as given"
    plain = [group for group in groups if _is_conventional(group)]
    others = [group for group in groups if not _is_conventional(group)]
    compared = next(filter(has_apex, others), others[0] if others else None)
    rule = "runs without APEX or another method"
    if compared is None:
        return [group.name for group in plain[:1]], f"{rule}: the first one"
    fitting = [g for g in plain if _same(g, compared, ("max_duration", *ORIGIN))]
    nearest = sorted(fitting, key=lambda group: len(differing([group, compared])))
    rule += f", as long as {compared.name} and from the same weights, the most similar first"
    return [group.name for group in nearest], rule


def _find(groups: Sequence[Group], name: str) -> str:
    for group in groups:
        if name == group.name or name in [run.name for run in group.runs]:
            return group.name
    known = ", ".join(group.name for group in groups)
    raise ValueError(f"baseline: got {name!r}, which is no run here. Known: {known}")


def _is_conventional(group: Group) -> bool:
    return not methods_of(group) and not group.runs[0].stages


def methods_of(group: Group) -> list[str]:
    """Those of `METHODS` that its settings name."""
    return [
        method for method in METHODS if any(is_below(k, method) for k in group.runs[0].settings)
    ]


def is_below(key: str, section: str) -> bool:
    """Whether a flat key is a section or lies in it."""
    return key == section or key.startswith(f"{section}.")


def has_apex(group: Group) -> bool:
    """By its settings, or by its stages where these are not known."""
    methods = methods_of(group)  # s2ft has stages as well
    return APEX in methods or bool(group.runs[0].stages and not methods)


def _same(one: Group, other: Group, keys: Iterable[str]) -> bool:
    first, second = one.runs[0].settings, other.runs[0].settings
    return all(first.get(key) == second.get(key) for key in keys)


def same_start(one: Group, other: Group) -> bool:
    """Whether by their settings two groups begin with the same weights."""
    return _same(one, other, ORIGIN)


def differing(groups: Sequence[Group], hidden: bool = False) -> dict[str, tuple[str, ...]]:
    """Settings that the groups do not all have alike: key to the values, as text.

    Args:
        hidden: True gives those instead that `is_hidden` leaves out.
    """
    all_settings = [group.runs[0].settings for group in groups]
    keys = sorted({key for settings in all_settings for key in settings})
    kept = [key for key in keys if is_hidden(key) == hidden and not is_seed(key)]
    return _unequal({key: [s.get(key, NOT_SET) for s in all_settings] for key in kept})


def differing_seeds(one: Group, other: Group) -> list[str]:
    """Seeds that both have set and that differ between a run and its counterpart, by their keys.

    A counterpart has the same `seed`, or where there is none the same place.
    """
    by_seed = dict(zip(other.seeds, other.runs, strict=True))
    places = zip_longest(one.seeds, one.runs, other.runs)
    found = [(run, by_seed.get(seed, beside)) for seed, run, beside in places]
    pairs = [(a.settings, b.settings) for a, b in found if a and b]
    return sorted({k for a, b in pairs for k in a if is_seed(k) and k in b and a[k] != b[k]})


def differing_versions(
    groups: Sequence[Group],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Packages whose versions differ, with each group's, and those on which all runs agree."""
    names = sorted({name for group in groups for run in group.runs for name in run.versions})
    rows = {name: [_versions(group, name) for group in groups] for name in names}
    different = {name: row for name, row in rows.items() if len(set().union(*row)) > 1}
    shown = {name: tuple(", ".join(sorted(own)) for own in row) for name, row in different.items()}
    return shown, {name: min(row[0]) for name, row in rows.items() if name not in different}


def _versions(group: Group, name: str) -> set[str]:
    """Of one package: those that the runs of a group had."""
    return {run.versions.get(name, "unknown") for run in group.runs}


def _unequal(rows: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
    texts = {key: tuple(str(value) for value in row) for key, row in rows.items()}
    return {key: row for key, row in texts.items() if len(set(row)) > 1}
