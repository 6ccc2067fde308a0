"""What a campaign has found, as tables: `python benchmarks/reproduce/summary.py FILE`.

Results of different texts, bases or scales never stand in one table.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from apex_composer.report.estimates import Estimate, estimate
from apex_composer.report.read_metrics import flatten

sys.path.append(str(Path(__file__).resolve().parents[1]))

from reproduce.comparisons import (  # noqa: E402
    Origin,
    Record,
    Runs,
    by_origin,
    difference,
    find_baseline,
    loss,
    machine,
    seeds_across_machines,
)
from reproduce.noise import DELTA, noise  # noqa: E402
from reproduce.records import read  # noqa: E402
from reproduce.tables import (  # noqa: E402
    NOTHING,
    Table,
    for_terminal,
    markdown,
    show,
    show_commit,
    show_loss,
    show_percent,
)


class Study(NamedTuple):
    """One question's arms from one base.

    Attributes:
        name: of the question.
        origin: what they share.
        arms: each with its baseline; a baseline without one. Baselines come first.
    """

    name: str
    origin: Origin
    arms: list[tuple[Runs, Runs | None]]

    @property
    def records(self) -> list[Record]:
        """Of all arms."""
        return [record for runs, _ in self.arms for record in runs.records]

    @property
    def title(self) -> str:
        """Study, scale and base."""
        one = self.records[0]
        return f"{self.name}, {one['scale']['name']}, base {base_name(one)}"


def base_name(record: Record) -> str:
    """What the base is, and the beginning of its hash."""
    return f"{record['settings']['base']} {record['base'][:8]}"


def studies_of(records: Sequence[Record]) -> list[Study]:
    """Every question on every base, in the order of the records."""
    return [
        Study(name, origin, _with_baselines(name, arms))
        for origin, arms in by_origin(records).items()
        for name in dict.fromkeys(study for runs in arms for study in runs.studies)
    ]


def _with_baselines(study: str, arms: Sequence[Runs]) -> list[tuple[Runs, Runs | None]]:
    """The arms of a study; what has no baseline itself has the runs of every study."""
    own = [(runs.of(study), find_baseline(runs.of(study), arms)) for runs in arms
           if study in runs.studies]  # fmt: skip
    used = {base.arm: base for _, base in own if base is not None}
    whole = [(used.get(runs.arm, runs) if base is None else runs, base) for runs, base in own]
    names = {runs.arm for runs, _ in own}
    missing = [(base, find_baseline(base, arms)) for arm, base in used.items() if arm not in names]
    return sorted([*missing, *whole], key=lambda pair: pair[1] is not None)


def tables_of(study: Study) -> Iterator[Table]:
    """All that is said of a study."""
    yield differences_table(study)
    yield losses_table(study)
    yield domains_table(study)
    yield noise_table(study)
    if facts := facts_table(study):
        yield facts


def differences_table(study: Study) -> Table:
    """Minus the baseline after every stage, nats; the baseline's own losses in its row."""
    inner = _stages(study) - 1
    rows = []
    for runs, baseline in study.arms:
        shown = show_loss if baseline is None else show
        cells = [shown(_at(runs, baseline, batch)) for batch in runs.ends[1:-1]]
        end = _at(runs, baseline, runs.ends[-1])
        against = NOTHING if baseline is None else baseline.arm
        change = NOTHING if baseline is None or end is None else show_percent(end)
        counted = len(end.values) if end is not None else len(runs.by_seed)
        rows.append([runs.arm, against, str(counted), *_filled(cells, inner), shown(end), change])
    stages = [f"stage {number + 1}" for number in range(inner)]
    head = ["arm", "minus", "seeds", *stages, "end", "perplexity at the end"]
    return Table(f"Differences, nats: {study.title}", head, rows, _READING)


_READING = (
    "Mean over domains, then over seeds (pairs of equal seeds) ± half the 95 % interval (Student's "
    "t). An arm without a baseline has its loss there. Perplexity: the ratio, minus 100 %."
)


def _at(runs: Runs, baseline: Runs | None, batch: int) -> Estimate | None:
    """The difference, or the loss of what has no baseline."""
    if baseline is not None:
        return difference(runs, baseline, batch)
    return estimate([loss(record, runs.ends.index(batch)) for record in runs.records])


def losses_table(study: Study) -> Table:
    """Mean loss before training and after every stage."""
    inner = _stages(study) - 1
    rows = []
    for runs, _ in study.arms:
        found = [
            f"{statistics.fmean(loss(record, place) for record in runs.records):.4f}"
            for place in range(len(runs.ends))
        ]
        cells = [found[0], *_filled(found[1:-1], inner), found[-1]]
        rows.append([runs.arm, ", ".join(map(str, sorted(runs.by_seed))), *cells])
    stages = [f"stage {number + 1}" for number in range(inner)]
    head = ["arm", "seeds", "start", *stages, "end"]
    return Table(f"Losses, nats per token: {study.title}", head, rows)


def domains_table(study: Study) -> Table:
    """Minus the baseline at the end, for every domain."""
    domains = list(study.records[0]["losses"][0])
    rows = [
        [
            runs.arm, baseline.arm,
            *(show(difference(runs, baseline, runs.ends[-1], [name])) for name in domains),
        ]
        for runs, baseline in study.arms
        if baseline is not None
    ]  # fmt: skip
    head = ["arm", "minus", *domains]
    return Table(f"Differences at the end by domain, nats: {study.title}", head, rows)


def noise_table(study: Study) -> Table:
    """What differs by chance, and how many seeds it would take to see `DELTA`."""
    rows = [[runs.arm, *_noise_cells([(runs, base)])] for runs, base in study.arms]
    rows.append(["all", *_noise_cells(study.arms)])
    head = ["arm", "of single runs", "of pairs", f"pairs to see {DELTA} nats"]
    note = "In brackets: degrees of freedom. Published: 0.0013 nats between seeds, 124M parameters."
    return Table(f"Standard deviation at the end, nats: {study.title}", head, rows, note)


def _noise_cells(arms: Sequence[tuple[Runs, Runs | None]]) -> list[str]:
    found = noise(arms)
    return [
        NOTHING if found.single is None else f"{found.single:.5f} ({found.single_freedom})",
        NOTHING if found.paired is None else f"{found.paired:.5f} ({found.paired_freedom})",
        NOTHING if found.seeds is None else str(found.seeds),
    ]


def facts_table(study: Study) -> Table | None:
    """What was measured in every stage, its mean over seeds; None where nothing was."""
    count = _stages(study)
    rows = []
    for runs, _ in study.arms:
        found = [
            [stage and flatten(stage) for stage in record["stages"]] for record in runs.records
        ]
        for name in dict.fromkeys(name for stages in found for own in stages for name in own):
            cells = [
                mean_of([stages[place].get(name) for stages in found])
                for place in range(len(found[0]))
            ]
            rows.append([runs.arm, name, *_filled(cells, count)])
    head = ["arm", "what", *(f"stage {number + 1}" for number in range(count))]
    return Table(f"Measured in each stage: {study.title}", head, rows) if rows else None


def mean_of(values: Sequence[object]) -> str:
    """Of those that are numbers."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return f"{statistics.fmean(numbers):.4g}" if numbers else NOTHING


def _stages(study: Study) -> int:
    return max(len(runs.ends) - 1 for runs, _ in study.arms)


def _filled(cells: Sequence[str], count: int) -> list[str]:
    return [*cells, *[NOTHING] * (count - len(cells))]


def provenance(records: Sequence[Record]) -> str:
    """Command, machine, date, commit, base and seeds of results, in one line."""
    one = records[0]
    source = f" ({one['texts_facts']['source']})" if "source" in one["texts_facts"] else ""
    days = sorted({record["date"][:10] for record in records})
    seeds = sorted({record["seed"] for record in records})
    parts = [
        " and ".join(f"`{text}`" for text in _each(records, lambda r: command(r, records))),
        " and ".join(_each(records, machine)),
        " to ".join(dict.fromkeys([days[0], days[-1]])),
        f"commit {', '.join(_each(records, lambda r: show_commit(r['machine']['commit'])))}",
        f"base {base_name(one)}, {one['base_batches']:,} batches; text {one['texts'][:8]}{source}",
        f"seeds {', '.join(map(str, seeds))}",
    ]
    return "; ".join(parts)


def command(record: Record, records: Sequence[Record]) -> str:
    """What made a result, without the questions and arms of its sitting that are none of these."""
    wanted = {"--study": {own["study"] for own in records}}
    wanted["--arms"] = {own["arm"] for own in records}
    kept, option = [], ""
    for word in record["command"].split():
        option = word if word.startswith("--") else option
        if word == option or word in wanted.get(option, {word}):
            kept.append(word)
    return " ".join(kept)


def _each(values: Sequence[Record], name: Callable[[Record], str]) -> list[str]:
    return sorted({name(value) for value in values})


def across_machines(study: Study) -> str:
    """Which pairs are not of one machine; nothing where all are."""
    found = {
        runs.arm: seeds_across_machines(runs, baseline)
        for runs, baseline in study.arms
        if baseline is not None
    }
    told = [f"{arm}, seed {', '.join(map(str, seeds))}" for arm, seeds in found.items() if seeds]
    if not told:
        return ""
    return (
        "Pairs of which one run is of another machine or torch, so that rounding differs too: "
        f"{'; '.join(told)}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of some files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSONL files of campaigns")
    parser.add_argument("--study", action="append", help="only this one; may be repeated")
    parser.add_argument("--markdown", action="store_true", help="for a page instead of a terminal")
    options = parser.parse_args(arguments)
    records = [record for path in options.results for record in read(path)]
    found = studies_of(records)
    known = [study.name for study in found]
    if lost := [name for name in options.study or known if name not in known]:
        parser.error(f"--study: got {', '.join(lost)}; the files have {', '.join(known)}")
    if not found:
        parser.error(f"no results in {', '.join(map(str, options.results))}")
    for study in found:
        if study.name in (options.study or known):
            _print(study, options.markdown)
    return 0


def _print(study: Study, as_markdown: bool) -> None:
    console = Console(markup=False, highlight=False)
    for table in tables_of(study):
        if as_markdown:
            print(f"**{table.title}**\n\n{markdown(table)}\n")
            continue
        console.print(for_terminal(table))
    print(across_machines(study), provenance(study.records), "", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
