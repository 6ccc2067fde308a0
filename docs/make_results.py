"""Writes docs/results.md from benchmarks/results/: `make docs`."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("benchmarks", "benchmarks/gpu", "docs")]

from base_words import (  # noqa: E402
    masked_in_words,
    shift_in_words,
    split_in_words,
    start_in_words,
)
from campaign_words import (  # noqa: E402
    PAPER,
    decay_in_words,
    growth_in_words,
    in_words,
    largest_share,
    lone_pairs_in_words,
    lowest_in_words,
    signed,
)
from confirm_words import confirmed_in_words  # noqa: E402
from gpu_results import gpu_sections  # noqa: E402
from pending_runs import pending  # noqa: E402
from reproduce.comparisons import (  # noqa: E402
    Runs,
    difference,
    is_conventional,
    training_difference,
)
from reproduce.records import read  # noqa: E402
from reproduce.studies import studies  # noqa: E402
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

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
SCALES = ("cpu", "gpu")
# What the paper's decay is worth without APEX, nats after each stage: the multi-power law with the
# coefficients that arXiv 2503.12811 fits to 400M parameters, at 1e-4, 4e-5, 1e-5.
LAW = (0.0, 0.031, 0.046)
TRAINED = "training text, last stage"
# Of operators, in the stage in which they became largest: the name of the fact, and of its column.
OPERATOR_FACTS = {
    "relative_norm": "operators' largest share of their rows", "effective_rank": "rank of T"
}  # fmt: skip
CONSTANT, STAGEWISE, APEX = "vanilla_constant", "vanilla_stagewise", "apex_rank"
HEAD = """# Results

What was measured, the paper's number beside ours where it is of the same quantity. Negative
results stay in. **Written by `make docs`** from `benchmarks/results/`, where every number is; the
words are in `docs/make_results.py` and beside it. Losses are in nats per token on held-out text,
the mean over domains, of which a small one counts as much as a large one; lower is better.
Differences are between runs of one seed, which read the same batches in the same order, over the
seeds that both arms have, with half their 95 % interval (Student's t).
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
BY_DOMAIN = (
    "At the end, by domain; each interval is for one comparison: of twenty, one misses by chance.\n"
)
RUN = """## How to run it

```bash
make reproduce                # SCALE=smoke: whether the machinery runs, a minute
make reproduce SCALE=cpu      # about 4 hours on 2 cores
make reproduce SCALE=cpu DATA=/data/redpajama CAMPAIGN="--folder runs/mine --budget 7200"
# On a GPU machine with torch, numpy and transformers but no Composer; text is prepared elsewhere:
python benchmarks/reproduce/texts.py shards --vocabulary 8192 --domain-bytes 80000000
python benchmarks/reproduce/campaign.py gpu --texts shards --arms vanilla_stagewise apex_rank
make docs                     # this page anew
```

Every result is a line of `benchmarks/results/reproduce-<scale>.jsonl` (`--out`: another file;
of smoke, which is no evidence, `runs/reproduce/smoke/results.jsonl`), written as its run ends.
What is there is not done again: a campaign that was killed, or whose
`--budget` was used up (seconds after which no run begins), goes on with the same command, its base
too, so that it may take several sittings. `--data` (`DATA`) is a folder of RedPajama-format text;
without it the text is what is installed with Python: `constraints.txt` and one Python give one text
(e8870a46 had the README of its day in it as well, and cannot be made again). Another text makes
another base, wants a `--folder` of its own (of bases and text, `runs/reproduce/<scale>`), and
never stands in one table with these. `--arms` takes some of a question's arms, `--seeds` the first
seeds of each, `--commit` is what results name where the checkout is no git repository. `--study`
takes one question or several, `main` without it (`shift` needs the domains of the installed text):
"""
OTHERS = """## One thing at a time, and other bases

A question begins with one seed, for from the base `mixture` pairs scatter little; from others they
may scatter more. What then ends lower than plain training by more than chance is run with three,
and what still looks best with five fresh ones (`confirm`): only that counts, and only what wins
there, against another rate too, would become a preset. Each interval is for
one comparison: of twenty, one misses by chance. Operators' share (without the authors' diagonals)
and the rank of T are means over all weights, of heads and of channels, in the stage in which
operators became largest.
"""
CLUSTER = """- **The paper's own run**, TinyLLaMA-1.1B on 10 B tokens of RedPajama and its tasks: it
  takes a GPU cluster (`apex-composer plan yamls/tinyllama_apex.yaml` says how long). Without it,
  nothing here says what expansion does at a billion parameters after trillions of tokens.
"""


def make_page(folder: Path = RESULTS) -> str:
    """The whole page, from the files of one folder."""
    records = {scale: read(folder / f"reproduce-{scale}.jsonl") for scale in SCALES}
    lost = {scale: read(folder / f"reproduce-{scale}.diverged.jsonl") for scale in SCALES}
    found = {scale: studies_of(own) for scale, own in records.items()}
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
            *(
                base_section(own, [study for study in main if _of_one_kind(study, own[0])])
                for own in _by_origin(others)
            ),
            *gpu,
            f"{RUN}{', '.join(f'`{name}`' for name in studies())}.\n",
            "## Pending\n",
            *(line for scale in SCALES for line in pending(scale, records[scale], lost[scale])),
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
    note = (
        "The paper's table 2; two decimals leave each gap uncertain by 0.002. `decay alone` is a "
        "prediction, not a measurement ([how](ambiguities.md#what-decay-alone-is-worth))."
    )
    return Table("", head, rows, note)


def main_section(study: Study) -> str:
    """The comparison of the paper at one scale, from one base."""
    arms = {runs.arm: runs for runs, _ in study.arms}
    sizes = study.records[0]["scale"]["sizes"]
    title = (
        f"### {base_title(study)}: width {sizes['hidden']}, {sizes['layers']} layers, "
        f"{sizes['length']} tokens a window\n"
    )
    parts = [title, *start_in_words(study)]
    if {STAGEWISE, APEX} <= set(arms):
        parts.append(in_words(arms[STAGEWISE], arms[APEX]))
    if {CONSTANT, STAGEWISE, APEX} <= set(arms):
        trio = arms[CONSTANT], arms[STAGEWISE], arms[APEX]
        parts += [decay_in_words(*trio), markdown(stage_table(*trio)) + "\n"]
    if STAGEWISE in arms:
        parts += lowest_in_words(study, arms[STAGEWISE])
    parts += masked_in_words(study.records)
    parts.append(_with_origin(with_facts(study), [study]))
    if len(arms) > 2:  # of one arm the sentences have said it
        parts += [BY_DOMAIN, markdown(domains_table(study)) + "\n"]
    return "\n".join(parts)


def base_title(study: Study) -> str:
    """Scale and base; bases of one kind are told apart by their hash."""
    one = study.records[0]
    return f"Scale `{one['scale']['name']}`, base {base_name(one)}"


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


def _by_origin(studies: Sequence[Study]) -> list[list[Study]]:
    origins = dict.fromkeys(study.origin for study in studies)
    return [[study for study in studies if study.origin == origin] for origin in origins]


def _of_one_kind(first: Study, second: Study) -> bool:
    """Whether two bases of one scale differ at most by their text."""
    return first.origin._replace(texts="", base="") == second.origin._replace(texts="", base="")


def base_section(studies: Sequence[Study], mains: Sequence[Study] = ()) -> str:
    """All other questions that one base answers, in one table; each baseline stands there once.

    Args:
        studies: of one base.
        mains: the paper's comparison on bases of its kind; the one on it has said what it is.
    """
    main = next((study for study in mains if study.origin == studies[0].origin), None)
    rows: list[list[str]] = []
    for study in studies:
        table = with_facts(study)
        for (runs, baseline), row in zip(study.arms, table.rows, strict=True):
            own = baseline is None and is_conventional(runs)
            rows.append([NOTHING if own else study.name.replace("_", " "), *row])
    longest = max(map(len, rows))
    filled = [[*row[:-5], *[NOTHING] * (longest - len(row)), *row[-5:]] for row in rows]
    whole = list(map(list, dict.fromkeys(map(tuple, filled))))
    stages = [f"stage {number + 1}" for number in range(longest - 9)]
    table = Table("", ["question", *table.head[:3], *stages, *table.head[-5:]], whole)
    title = f"### {base_title(studies[0])}\n"
    records = [record for study in studies for record in study.records]
    parts = [title, *([] if main else start_in_words(studies[0]))]
    if main is None or not masked_in_words(main.records):
        parts += masked_in_words(records)
    parts += split_in_words(records)
    for study in studies:
        parts += [*shift_in_words(study.arms), *confirmed_in_words(study)]
    parts += lone_pairs_in_words(studies, mains)
    parts += growth_in_words([pair for study in studies for pair in study.arms])
    return "\n".join([*parts, _with_origin(table, studies)])


def with_facts(study: Study) -> Table:
    """The differences, beside them those on the text trained on, and operators at their largest."""
    table = differences_table(study)
    rows = []
    for (runs, baseline), row in zip(study.arms, table.rows, strict=True):
        largest = [largest_share(record["stages"]) for record in runs.records]
        facts = [mean_of([stage.get(name) or None for stage in largest]) for name in OPERATOR_FACTS]
        trained = None if baseline is None else training_difference(runs, baseline)
        rows.append([*row, show(trained), *facts])
    return Table("", [*table.head, TRAINED, *OPERATOR_FACTS.values()], rows)


def _with_origin(table: Table, studies: Sequence[Study]) -> str:
    records = [record for study in studies for record in study.records]
    mixed = dict.fromkeys(filter(None, map(across_machines, studies)))
    return "\n\n".join([markdown(table), *mixed, f"{provenance(records)}.\n"])


if __name__ == "__main__":
    PAGE.write_text(make_page())
