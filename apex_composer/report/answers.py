"""The answers that a report gives: which run is better, by how much, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_composer.report.run import Run

TOTAL = "total"  # in place of a domain: all predicted tokens of all domains


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how far it can be trusted.

    Attributes:
        mean: over the seeds; with one seed its value.
        low: lower end of the 95 % interval (Student's t); None with one seed.
        high: upper end.
        values: of each seed, or of each pair of equal seeds, in the order of the seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


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


@dataclass(frozen=True)
class Final:
    """A group's last evaluation of one domain, or of all.

    Attributes:
        loss: nats per token.
        perplexity: exp of each run's loss, then the mean.
        loss_difference: minus that of the first baseline, nats per token; None for the baseline
            itself, without a baseline, and where the baseline has not evaluated this domain.
        perplexity_difference: the same of perplexities.
        paired: whether differences are between runs of equal seeds; otherwise their interval is
            Welch's, and they have one value, the difference of the means.
    """

    loss: Estimate
    perplexity: Estimate
    loss_difference: Estimate | None
    perplexity_difference: Estimate | None
    paired: bool


@dataclass(frozen=True)
class Crossing:
    """Where one validation curve comes down to a loss and stays there.

    The curve is linear in tokens between two evaluations. It has come down at the first
    evaluation from which on all are at or below the target, to the end of the run.

    Attributes:
        seed: of the run.
        target: nats per token, the baseline's last evaluation.
        tokens: where the line between `after` and `by` meets the target; None where the curve
            never comes down for good, or is below the target from its first evaluation on.
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
        crossings: of each seed (each pair of equal seeds where they are paired).
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


@dataclass(frozen=True)
class Speed:
    """How fast a group trained, over the batches of all its runs.

    Attributes:
        median: seconds per batch, evaluation left out; None where nothing was kept.
        lower_quartile: of the same.
        upper_quartile: of the same.
        tokens_per_second: tokens of a batch over the median.
        mfu: median of what `speed_monitor` has logged, 0 to 1; None without it.
        apex_share: median of APEX's own time in a step over the median step; None without APEX.
        device: GPU or CPU, with their number.
    """

    median: float | None
    lower_quartile: float | None
    upper_quartile: float | None
    tokens_per_second: float | None
    mfu: float | None
    apex_share: float | None
    device: str


@dataclass(frozen=True)
class Answer:
    """All that a report says in numbers and words.

    Attributes:
        sentence: the answer with its uncertainty, in one or two sentences; claims no more than
            the numbers hold.
        cautions: what a reader must know before believing it, a sentence each.
        groups: in the order in which the runs were given, baselines included.
        baselines: names of groups, the one that differences are taken from first; may be empty.
        baseline_rule: how they were found, for people.
        domains: those that any run has evaluated, and `total` at the end where it is known.
        finals: by group name, then by domain; a domain that a group has not evaluated is absent.
        reaches: of each group and each baseline, in `total`, or by domain where that is unknown.
        settings: those that differ: key to the values in the order of the groups, as text.
        hidden: settings that differ and were left out: names and paths.
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
            Default: found by rule, see `Answer.baseline_rule`.

    Raises:
        ValueError: no run has a name that `baselines` gives.
    """
    raise NotImplementedError  # the answers follow
