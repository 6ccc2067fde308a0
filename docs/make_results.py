"""Writes docs/results.md from benchmarks/results/: `make docs`."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

from gpu_results import gpu_sections  # noqa: E402
from reproduce.comparisons import DELTA, Noise, Record, Runs, difference, noise  # noqa: E402
from reproduce.records import read  # noqa: E402
from reproduce.summary import (  # noqa: E402
    Study,
    across_machines,
    base_name,
    differences_table,
    domains_table,
    mean_of,
    provenance,
    studies_of,
)
from reproduce.tables import NOTHING, Table, markdown, show  # noqa: E402

from apex_composer.report.crossings import find_crossing  # noqa: E402
from apex_composer.report.estimates import Estimate, estimate  # noqa: E402
from apex_composer.report.run import Curve  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
SCALES = ("cpu", "gpu")
# Perplexities after each stage, at a constant rate and with APEX (paper, table 2).
PAPER = ((5.87, 5.75), (5.85, 5.55), (5.83, 5.44))
PAPER_SHARE = 33  # % of the tokens after which APEX is as good as the constant rate
# What the paper's decay is worth without APEX, nats after each stage: the multi-power law with the
# coefficients that arXiv 2503.12811 fits to 400M parameters, at 1e-4, 4e-5, 1e-5.
LAW = (0.0, 0.031, 0.046)
# Of operators, in the last stage: the name of the fact, and of its column.
OPERATOR_FACTS = {"relative_norm": "operators' share of their rows", "effective_rank": "rank of T"}
CONSTANT, STAGEWISE, APEX = "vanilla_constant", "vanilla_stagewise", "apex_rank"
HEAD = """# Results

What was measured, the paper's number beside ours where it is of the same quantity. Negative
results stay in. **Written by `make docs`** from `benchmarks/results/`, where every number is; the
words are in `docs/make_results.py`. Losses are in nats per token on held-out text, the mean over
domains, lower is better; differences are between runs of one seed, which read the same batches in
the same order, with half their 95 % interval (Student's t) over the seeds.
"""
QUESTION = """## Does expansion pay?

The paper compares APEX, whose learning rate falls from stage to stage, with a constant one (as we
read it: [ambiguities](ambiguities.md)). So its gain is that of the decay and that of expansion.
What decay alone is worth can be predicted from published loss curves
([MultiPowerLaw](https://github.com/thu-yao-01-luo/MultiPowerLaw),
[arXiv 2503.12811](https://arxiv.org/abs/2503.12811): the law for 400M parameters, at the paper's
rates), and measured by a third arm, plain training with APEX's rates: `vanilla_stagewise`.
"""
READ = """`python benchmarks/reproduce/summary.py FILE` prints all tables, by domain too;
`apex-composer report FILE/BASE/STUDY` draws them ([how](report.md#campaigns)).
"""
OTHERS = """## One thing at a time, and other bases

Each interval is for one comparison: of twenty, one misses by chance. So what looks best here is run
again with fresh seeds (`confirm`), and only that counts.
"""
CLUSTER = """- **The paper's own run**, TinyLLaMA-1.1B on 10 B tokens of RedPajama and its tasks: it
  takes a GPU cluster (`apex-composer plan yamls/tinyllama_apex.yaml` says how long). Without it,
  nothing here says what expansion does at a billion parameters after trillions of tokens.
"""
WHY = {"cpu": "about 4 hours on 2 cores", "gpu": "when a GPU is lent, 25 minutes each time"}


def make_page(folder: Path = RESULTS) -> str:
    """The whole page, from the files of one folder."""
    campaigns = {scale: folder / f"reproduce-{scale}.jsonl" for scale in SCALES}
    found = {scale: studies_of(read(path)) for scale, path in campaigns.items()}
    main = [study for own in found.values() for study in own if study.name == "main"]
    others = [study for own in found.values() for study in own if study.name != "main"]
    gpu = list(gpu_sections(folder))
    return "\n".join(
        [
            HEAD,
            QUESTION,
            markdown(paper_table()) + "\n",
            *map(main_section, main),
            *([READ] if main or others else []),
            *([OTHERS] if others else []),
            *(base_section(own) for own in _by_origin(others)),
            *gpu,
            "## Pending\n",
            *(pending(scale) for scale in SCALES if not found[scale]),
            *([] if gpu else ["- **Kernels and steps on a GPU**: no results in this checkout."]),
            CLUSTER,
        ]
    )


def paper_table() -> Table:
    """What the paper reports, and what of it decay explains."""
    rows = []
    for stage, ((constant, apex), decay) in enumerate(zip(PAPER, LAW, strict=True), 1):
        gap = math.log(apex / constant)
        cells = [signed(value) for value in (gap, -decay, gap + decay)]
        rows.append([str(stage), f"{constant:.2f}", f"{apex:.2f}", *cells])
    head = ["after stage", "perplexity, constant", "APEX", "gap, nats", "decay alone", "is left"]
    note = "The paper's table 2. `decay alone` is a prediction, not a measurement."
    return Table("", head, rows, note)


def main_section(study: Study) -> str:
    """The comparison of the paper at one scale, from one base."""
    arms = {runs.arm: runs for runs, _ in study.arms}
    one = study.records[0]
    sizes = one["scale"]["sizes"]
    title = (
        f"### Scale `{one['scale']['name']}`, base {one['settings']['base']}: width "
        f"{sizes['hidden']}, {sizes['layers']} layers, {sizes['length']} tokens a window\n"
    )
    parts = [title]
    if {CONSTANT, STAGEWISE, APEX} <= set(arms):
        trio = arms[CONSTANT], arms[STAGEWISE], arms[APEX]
        parts += [in_words(*trio), markdown(stage_table(*trio)) + "\n"]
    parts += masked_in_words(study.records)
    return "\n".join([*parts, _with_origin(with_facts(study), [study])])


def in_words(constant: Runs, stagewise: Runs, apex: Runs) -> str:
    """What the three arms say, and how sure that is."""
    first, last = (difference(apex, stagewise, apex.ends[place]) for place in (1, -1))
    decay = difference(stagewise, constant, apex.ends[-1])
    if first is None or last is None or decay is None:
        return "The runs of these arms have no seeds in common yet.\n"
    lines = [
        f"At equal rates, APEX minus plain training is {show(first)} nats after the first stage "
        f"({judge(first, math.log(PAPER[0][1] / PAPER[0][0]))}) and {show(last)} at the end "
        f"({judge(last)}); {len(last.values)} pairs of seeds.",
        f"Decay alone is worth {show(decay)} at the end.",
        "The constant rate's last loss is reached by plain training with decay after "
        f"{share(stagewise, constant)} of the batches, by APEX after {share(apex, constant)} "
        f"(paper: {PAPER_SHARE} %), interpolated between the ends of stages.",
        *chance_in_words([constant, stagewise, apex], noise([(apex, stagewise)])),
    ]
    return "\n".join([*lines, ""])


def chance_in_words(arms: Sequence[Runs], pairs: Noise) -> Iterator[str]:
    """How far runs scatter, and how many of them would show a small difference."""
    single = noise([(runs, None) for runs in arms])
    if single.single is not None:
        yield (
            f"Runs of one arm differ by {single.single:.5f} nats between seeds (standard deviation "
            f"with {single.single_freedom} degrees of freedom; published for 124M: 0.0013)."
        )
    if pairs.paired is not None:
        yield (
            f"Pairs of runs differ by {pairs.paired:.5f}: {pairs.seeds} pairs would show {DELTA} "
            "nats (95 %, power 80 %)."
        )


def judge(found: Estimate, paper: float | None = None) -> str:
    """What an interval includes: no difference, and the paper's."""
    if found.low is None:
        return "one seed, so without an interval"
    excludes = not found.low <= 0 <= found.high
    text = "the interval excludes 0" if excludes else "the interval includes 0"
    if paper is not None:
        inside = found.low <= paper <= found.high
        text += f" and {'includes' if inside else 'excludes'} the paper's {signed(paper)}"
    return text


def share(runs: Runs, target: Runs) -> str:
    """Of the target's batches, those after which a run stays at its last loss or below."""
    shares = []
    for seed in sorted(set(runs.by_seed) & set(target.by_seed)):
        curves = [_mean_curve(own.by_seed[seed]) for own in (runs, target)]
        found = find_crossing(curves[0], curves[1].values[-1])[0]
        if found is None:
            return "more than all"
        shares.append(100 * found / target.ends[-1])
    return f"{estimate(shares).mean:.0f} %"


def _mean_curve(record: Mapping[str, Any]) -> Curve:
    ends = [0, *record["stage_ends"]]
    return Curve(ends, ends, [sum(own.values()) / len(own) for own in record["losses"]])


def stage_table(constant: Runs, stagewise: Runs, apex: Runs) -> Table:
    """The paper's differences beside ours, after every stage."""
    rows = []
    for place, batch in enumerate(apex.ends[1:]):
        ours = [
            show(difference(*pair, batch))
            for pair in ((apex, constant), (stagewise, constant), (apex, stagewise))
        ]
        rows.append([str(place + 1), *ours, *paper_cells(place)])
    head = ["after stage", "APEX − constant", "decay alone", "APEX − same rates"]
    return Table("", [*head, "paper: APEX − constant", "paper, decay by the law"], rows)


def paper_cells(place: int) -> list[str]:
    """The paper's difference after a stage, and the law's."""
    if place >= len(PAPER):
        return [NOTHING, NOTHING]
    values = (math.log(PAPER[place][1] / PAPER[place][0]), -LAW[place])
    return [signed(value) for value in values]


def signed(nats: float) -> str:
    """A published difference; nothing is a plain 0."""
    return f"{nats:+.3f}".replace("-", "−") if nats else "0"


def _by_origin(studies: Sequence[Study]) -> list[list[Study]]:
    origins = dict.fromkeys(study.origin for study in studies)
    return [[study for study in studies if study.origin == origin] for origin in origins]


def base_section(studies: Sequence[Study]) -> str:
    """All other questions that one base answers, in one table; each baseline stands there once."""
    one = studies[0].records[0]
    rows: dict[tuple[str, ...], None] = {}
    for study in studies:
        table = with_facts(study)
        for (_, baseline), row in zip(study.arms, table.rows, strict=True):
            question = NOTHING if baseline is None else study.name.replace("_", " ")
            rows[(question, *row)] = None
    longest = max(map(len, rows))
    whole = [[*row[:4], *row[4:-4], *[NOTHING] * (longest - len(row)), *row[-4:]] for row in rows]
    stages = [f"stage {number + 1}" for number in range(longest - 8)]
    table = Table("", ["question", *table.head[:3], *stages, *table.head[-4:]], whole)
    title = f"### Scale `{one['scale']['name']}`, base {one['settings']['base']}\n"
    records = [record for study in studies for record in study.records]
    return "\n".join([title, *masked_in_words(records), _with_origin(table, studies)])


def with_facts(study: Study) -> Table:
    """The differences, and beside them what operators were in the last stage."""
    table = differences_table(study)
    rows = [
        [*row, *(mean_of([record["stages"][-1].get(name) for record in runs.records])
                 for name in OPERATOR_FACTS)]
        for (runs, _), row in zip(study.arms, table.rows, strict=True)
    ]  # fmt: skip
    return Table("", [*table.head, *OPERATOR_FACTS.values()], rows)


def _with_origin(table: Table, studies: Sequence[Study]) -> str:
    records = [record for study in studies for record in study.records]
    mixed = dict.fromkeys(filter(None, map(across_machines, studies)))
    return "\n\n".join([markdown(table), *mixed, f"{provenance(records)}.\n"])


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


def pending(scale: str) -> str:
    """What has not been run, and what runs it."""
    return (
        f"- **Campaign `{scale}`** (`make reproduce SCALE={scale}`, {WHY[scale]}): no results yet."
    )


if __name__ == "__main__":
    PAGE.write_text(make_page())
