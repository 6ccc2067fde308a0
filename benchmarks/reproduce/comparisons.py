"""Records of a campaign as differences: which runs may be compared, by how much they differ.

A difference is of two runs from the same base that saw the same batches in the same order.
"""

import itertools
import json
import operator
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reproduce.arms import stops

from apex_composer.report.estimates import Estimate, estimate

Record = dict[str, Any]
# Settings of an arm that make its learning rate at every batch, and where its optimizer begins.
SCHEDULE = ("schedule", "rate", "keep_optimizer", "stage_batches", "stages")


class Origin(NamedTuple):
    """What runs must share to be compared.

    Attributes:
        texts: hash of the text.
        base: hash of the base.
        kind: of base, which says what text they read.
        scale: all its settings, as JSON.
    """

    texts: str
    base: str
    kind: str
    scale: str


@dataclass(frozen=True)
class Runs:
    """The runs of one arm from one base, one for each seed.

    Attributes:
        arm: its name.
        settings: of the arm, without its name and its study.
        by_seed: results.
        asked: seeds by the study that asked for them.
    """

    arm: str
    settings: Mapping[str, Any]
    by_seed: Mapping[int, Record]
    asked: Mapping[str, Sequence[int]]

    @property
    def studies(self) -> tuple[str, ...]:
        """That asked for them."""
        return tuple(self.asked)

    @property
    def records(self) -> list[Record]:
        """Results in the order of the seeds."""
        return [self.by_seed[seed] for seed in sorted(self.by_seed)]

    @property
    def ends(self) -> list[int]:
        """Batches at which it was evaluated, the start included."""
        return [0, *self.records[0]["stage_ends"]]

    def of(self, study: str) -> "Runs":
        """Those that one study asked for."""
        own = {seed: self.by_seed[seed] for seed in self.asked[study]}
        return Runs(self.arm, self.settings, own, {study: self.asked[study]})


def by_origin(records: Iterable[Record]) -> dict[Origin, list[Runs]]:
    """Records sorted by what they may be compared with, and there by arm.

    Raises:
        ValueError: where two records are of the same arm, settings and seed.
    """
    found: dict[Origin, dict[str, list[Record]]] = {}
    for record in records:
        kind = record["settings"]["base"]
        origin = Origin(record["texts"], record["base"], kind, _text(record["scale"]))
        arm = _text([record["arm"], _settings(record)])
        found.setdefault(origin, {}).setdefault(arm, []).append(record)
    return {origin: [_runs(own) for own in arms.values()] for origin, arms in found.items()}


def _settings(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record["settings"].items() if k not in ("name", "study")}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _runs(records: Sequence[Record]) -> Runs:
    by_seed: dict[int, Record] = {}
    asked: dict[str, dict[int, None]] = {}
    ends = records[0]["stage_ends"]
    for record in records:
        name, whole = f"{record['arm']}, seed {record['seed']}", len(ends) + 1
        if record["stage_ends"] != ends or len(record["losses"]) != whole:
            raise ValueError(
                f"{name}: {len(record['losses'])} evaluations, stages end at "
                f"{record['stage_ends']}; expected {whole} and {ends}. Remove the line"
            )
        other = by_seed.setdefault(record["seed"], record)
        if _text(other["losses"]) != _text(record["losses"]):
            raise ValueError(
                f"{name}: two results ({other['date']} and {record['date']}) of the same base and "
                "settings differ. Remove one of the lines"
            )
        asked.setdefault(record["study"], {})[record["seed"]] = None
    seeds = {study: tuple(own) for study, own in asked.items()}
    return Runs(records[0]["arm"], _settings(records[0]), by_seed, seeds)


def is_conventional(runs: Runs) -> bool:
    """Whether it is plain training, and no average of its checkpoints.

    Moments that begin anew in every stage need its stages, that is a selection without operators.
    """
    settings, averaged = runs.settings, "averaged_batches" in runs.records[0]
    plain = settings["apex"] is None and not settings["variation"]
    stages_alone = settings["apex"] == {"expansion": False} and has_fresh_moments(runs)
    return (plain or (stages_alone and len(settings["variation"]) == 1)) and not averaged


def has_fresh_moments(runs: Runs) -> bool:
    """Whether the weights' moments begin from zero in every stage."""
    return bool(runs.settings["variation"].get("fresh_moments"))


def is_main_baseline(runs: Runs) -> bool:
    """Whether it is plain training with the scale's own stages, rates and optimizer."""
    schedule = tuple(runs.settings[name] for name in SCHEDULE)
    plain = is_conventional(runs) and not has_fresh_moments(runs)
    return plain and schedule == ("stagewise", 1.0, True, 1.0, None)


def find_baseline(runs: Runs, others: Sequence[Runs]) -> Runs | None:
    """The conventional runs of equal schedule; of conventional ones those with the scale's rates by
    stage.

    Stages of other lengths are compared only where both end at the same batch.

    Args:
        runs: of an arm.
        others: all of the same origin.

    Returns:
        None where there is none, as for the last-named themselves: APEX with another schedule than
        what it is held against would be credited with the schedule.
    """
    fitting = [
        other
        for other in others
        if other.settings != runs.settings and other.ends[-1] == runs.ends[-1]
        and is_conventional(other) and set(other.by_seed) & set(runs.by_seed)
    ]  # fmt: skip
    if runs.settings["apex"] is not None and not is_conventional(runs):
        equal = [
            other
            for other in fitting
            if all(other.settings[key] == runs.settings[key] for key in SCHEDULE)
            and has_fresh_moments(other) == has_fresh_moments(runs)
        ]
        return equal[0] if equal else None
    if is_main_baseline(runs):
        return None
    plain = [other for other in fitting if is_main_baseline(other)]
    return max(plain, key=lambda other: other.ends == runs.ends, default=None)


def loss(record: Record, place: int, domains: Collection[str] | None = None) -> float:
    """Nats per token at an evaluation: the mean over some domains, or over all."""
    losses = record["losses"][place]
    return statistics.fmean(losses.values() if domains is None else map(losses.get, domains))


def difference(
    runs: Runs, baseline: Runs, batch: int, domains: Collection[str] | None = None
) -> Estimate | None:
    """Loss minus the baseline's in nats, over the seeds that both have.

    Args:
        batch: at which both were evaluated; where only their last ones agree, only that counts.
        domains: over which the mean is taken; default all.

    Returns:
        None where it cannot be compared.
    """
    shared = runs.ends == baseline.ends or batch == runs.ends[-1] == baseline.ends[-1]
    seeds = sorted(set(runs.by_seed) & set(baseline.by_seed))
    if not shared or not seeds or batch not in runs.ends or batch not in baseline.ends:
        return None
    places = runs.ends.index(batch), baseline.ends.index(batch)
    return estimate(
        [
            loss(runs.by_seed[seed], places[0], domains)
            - loss(baseline.by_seed[seed], places[1], domains)
            for seed in seeds
        ]
    )


def training_difference(runs: Runs, baseline: Runs, stage: int = -1) -> Estimate | None:
    """Training loss in a stage minus the baseline's in nats, over the seeds that both have.

    Its mean over the batches, each before its step. A run that reads its text at most once has not
    been trained on these windows, but on others of the same documents: it says how well they are
    learned, and over so many tokens pairs scatter least.

    Args:
        runs: of an arm.
        baseline: of what it is compared with.
        stage: its index.

    Returns:
        None where stages or the batches of the means differ.
    """
    seeds = sorted(set(runs.by_seed) & set(baseline.by_seed))
    if runs.ends != baseline.ends or not seeds:
        return None
    spans = [[start, *stops(start, end)] for start, end in itertools.pairwise(runs.ends)]
    counts = [len(span) - 1 for span in spans]
    sizes = [after - before for before, after in itertools.pairwise(spans[stage])]
    first = sum(counts[: range(len(spans))[stage]])
    values = []
    for seed in seeds:
        pair = [own.by_seed[seed]["training_losses"] for own in (runs, baseline)]
        if any(len(own) != sum(counts) for own in pair):
            return None
        gaps = [one - other for one, other in zip(*pair, strict=True)][first:]
        values.append(sum(map(operator.mul, sizes, gaps)) / sum(sizes))
    return estimate(values)


def seeds_across_machines(runs: Runs, baseline: Runs) -> list[int]:
    """Seeds whose two runs are of different machines, or of different torch."""
    shared = sorted(set(runs.by_seed) & set(baseline.by_seed))
    return [s for s in shared if machine(runs.by_seed[s]) != machine(baseline.by_seed[s])]


def machine(record: Record) -> str:
    """What computed it: the device, on a CPU its cores and a run's threads, and the torch."""
    own = record["machine"]
    device = own["device"]
    if device == "CPU (interpreted)":  # of kernels, which these runs do without
        device = "a CPU that the results do not name"
    if "threads" in own:
        device += f" ({own['cores']} cores, threads of a run: {own['threads']})"
    return f"{device}, torch {own['versions']['torch']}"
