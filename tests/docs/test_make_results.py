"""docs/results.md is what benchmarks/results/ holds."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from campaign_records import APEX, make_record, small_campaign, write_records

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
make_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_results)
import reproduce.campaign  # noqa: E402
import reproduce.studies  # noqa: E402
from reproduce.scales import SCALES as SIZES  # noqa: E402

gpu_results = sys.modules["gpu_results"]
pending_runs = sys.modules["pending_runs"]
campaign_words = sys.modules["campaign_words"]


def test_the_page_is_what_the_results_say():
    page = make_results.make_page()
    assert make_results.PAGE.read_text() == page, "docs/results.md is old: `make docs`"
    assert len(page.splitlines()) < 420  # a section for every base, a row for every arm


def test_all_pages_give_one_prediction_of_what_decay_is_worth():
    told = " ".join((ROOT / "docs" / "ambiguities.md").read_text().split())
    given = [0.0, *map(float, re.search(r"says 0, (0\.\d+) and (0\.\d+) without", told).groups())]
    assert given == list(make_results.LAW)  # tests/docs/test_ambiguities.py computes it
    readme = " ".join((ROOT / "README.md").read_text().split())
    gap = math.log(campaign_words.PAPER[-1][0] / campaign_words.PAPER[-1][1])
    assert (
        f"gain of {gap:.3f} nats, published loss curves, extrapolated, predict {given[-1]:.3f}"
        in readme
    )


def test_the_readme_says_what_was_measured():
    readme = " ".join((ROOT / "README.md").read_text().split())
    page = make_results.PAGE.read_text()
    found = re.search(r"takes ([\d.]+) % (longer|less) with APEX", readme)
    (row,) = re.findall(r"`apex_kernels` .*", page)
    measured = float(row.split("|")[3].split()[0].replace("−", "-"))
    assert found and (float(found[1]), found[2]) == (
        round(abs(measured), 1),
        "longer" if measured > 0 else "less",
    )
    # What is said of expansion: of one scale, its first table of arms.
    told = re.search(
        r"`(\w+)` campaign \((\d+) pairs?\) APEX minus plain training is (.*?) nats", readme
    )
    section = page.partition(f"### Scale `{told[1]}`, base mixture")[2].partition("\n### ")[0]
    row = re.search(
        r"\| apex_rank \| vanilla_stagewise \| (\d+) \| (?:[^|]*\| )*?([^|]*?) \| [^|]* % ", section
    )
    assert (told[2], told[3]) == row.groups()
    held_out = re.search(r"at the end \(the interval (\w+) 0\)", section)[1]
    assert ("tell it from none" in readme) is (held_out == "includes")
    trained = re.search(r"and (\S+ ± \S+) on the text trained on", readme)[1]
    assert re.search(rf"is \S+ ± \S+, \S+ ± \S+, {re.escape(trained)} in its stages", section)
    others = page.partition("## One thing at a time")[2].partition("\n## ")[0]
    lost = re.search(r"learn 100 times faster lose ([\d.]+)\.", readme)
    row = re.search(r"\| apex_operator_rate_100 \| (?:[^|]*\| )*?\+([\d.]+) \| [^|]* % ", others)
    assert round(float(row[1]), 3) == float(lost[1])
    # What is said of the other bases and of the authors' operator.
    kinds = ("shift", "context", "superfluous")
    arms = "|".join(["apex_authors", *(f"{base}_apex_rank" for base in kinds)])
    rows = re.findall(rf"\| (?:{arms}) \| (?:[^|]*\| )*?([^|]*?) \| [^|]* % ", others)
    ends = [float(row.replace("−", "-").split(" ± ")[0]) for row in rows]
    most = re.search(r"with the authors' operator it ends at most ([\d.]+) nats lower", readme)[1]
    assert len(ends) >= 4 and -min(ends) <= float(most) < -min(ends) + 1e-4
    fresh = re.search(r"at (\S+ ± \S+) with five fresh seeds", readme)[1]
    told = f"With 5 fresh seeds `shift_apex_rank` minus `shift_vanilla_stagewise` is {fresh} at"
    assert f"{told} the end (the interval includes 0)" in others
    assert "None ends lower than plain training at every rate" in others
    lower = re.findall(r"Of \d+ arms that select units (\d+) end lower", others)
    assert ("no variation" in readme) is (set(lower) == {"0"})
    assert "GPU numbers are pending" not in readme


def test_what_ended_lower_than_plain_training_is_run_with_more_seeds():
    told = re.findall(r"end lower than plain training by more: ([^;]*);", make_results.make_page())
    assert {name.strip("`") for names in told for name in names.split(", ")} <= {
        *reproduce.studies.FOLLOWED,
        *reproduce.studies.CONFIRMED,
    }


def test_what_has_no_results_is_pending(tmp_path):
    page = make_results.make_page(tmp_path)
    assert "| 1 | 5.87 | 5.75 | −0.021 | 0 | −0.021 |" in page
    assert "| 3 | 5.83 | 5.44 | −0.069 | −0.046 | −0.023 |" in page
    told = page.partition("## Pending")[2]
    assert "Campaign `cpu`" in told and "Campaign `gpu`" in told and "Kernels and steps" in told


def test_a_campaign_stands_beside_the_paper(tmp_path):
    settings = APEX | {"variation": {"x": 1}}
    masked = {"whole": 3.0, "lowest": 3.01, "random": 3.2, "top": 5.0}
    # Of operators the page has what they were in the stage in which they became largest.
    facts = [{"masked": masked, "relative_norm": 0.05, "effective_rank": 7.5},
             {"relative_norm": 0.01, "effective_rank": 9.5}]  # fmt: skip
    given = {"study": "operator_rate", "settings": settings, "stages": facts}
    vary = make_record("vary", 1, [3.5, 3.2, 3.1], **given)
    one = make_record("one_stage", 1, [3.5, 3.1], ends=[200], study="count", settings=settings)
    write_records(tmp_path / "reproduce-cpu.jsonl", [*small_campaign(), vary, one])
    page = make_results.make_page(tmp_path)
    assert "### Scale `cpu`, base mixture bbbbbbbb: width 8, 1 layers, 10 tokens a window" in page
    # APEX minus constant, decay alone, APEX at equal rates, and the paper's and the law's.
    assert "| 1 | +0.01500 ± 0.06353 | 0 | +0.02000 ± 0.02484 | −0.021 | 0 |" in page
    assert "the interval includes 0 and excludes the paper's −0.021" in page
    assert "differ by 0.00100 (2 degrees of freedom): if that is their scatter, 3 pairs" in page
    # Of one arm: the others have the same seeds, so that they add no runs of their own.
    assert "`vanilla_stagewise` differ by 0.10000 nats between seeds (standard deviation, 2" in page
    assert "a difference below 0.00248 nats cannot be told from none" in page
    behind = "3 of 3 on code (+0.00100, +0.00200, +0.00300)."
    assert f"APEX ends behind in {behind.replace('code', 'book')[:-1]}; {behind}" in page
    assert "| apex_rank | vanilla_stagewise | +0.00200 ± 0.00248 | +0.00200 ± 0.00248 |" in page
    told = page.partition("## One thing at a time")[2]
    row = "| vary | vanilla_stagewise | 1 | +0.10000 | +0.10000 | +10.52 % | – | 0.05 | 7.5 |"
    assert f"| operator rate {row}" in told
    assert (
        "| count | one_stage | vanilla_stagewise | 1 | – | +0.10000 | +10.52 % | – | – | – |"
        in told
    )
    assert told.count("| – | vanilla_stagewise |") == 1
    assert "lowest norms, this base's loss is 0.0100 nats higher" in told
    assert "\n`python benchmarks/reproduce/campaign.py cpu --study main`; cpu, 2 threads" in page
    told = page.partition("## Pending")[2]
    assert "`cpu`, question `main`**: 10 of" in told and "Campaign `gpu`** (" in told


def test_another_base_says_what_it_is_and_a_baseline_stands_there_once(tmp_path):
    given, kind = {"study": "count", "base": "c" * 64}, {"base": "context"}
    arms = {"a": APEX, "b": APEX | {"variation": {"x": 1}}, "vanilla_stagewise": {}}
    records = [make_record(arm, 1, [3.5, 3.2, 3.1], settings=own | kind, **given)
               for arm, own in arms.items()]  # fmt: skip
    four = {"settings": APEX | kind | {"stages": 4}, "ends": [50, 100, 150, 200]}
    longer = make_record("four", 1, [3.5, 3.4, 3.2, 3.1, 3.1], **{**given, **four, "study": "long"})
    write_records(tmp_path / "reproduce-cpu.jsonl", [*records, longer])
    told = make_results.make_page(tmp_path).partition("## One thing at a time")[2]
    assert "This base is trained with windows of half the length.\n" in told
    assert "its loss is 3.5000 nats" in told and "is not known yet" in told
    assert told.count("| – | vanilla_stagewise | – | 1 | 3.2000 | – | – | 3.1000 |") == 1
    # Another schedule: not held against what it would be credited with.
    assert "| long | four | – | 1 | 3.4000 | 3.2000 | 3.1000 | 3.1000 |" in told


def test_pairs_across_machines_are_told_on_the_page(tmp_path):
    records = small_campaign()
    records[1]["machine"] = records[1]["machine"] | {"device": "NVIDIA H200"}
    page = make_results.make_page(write_records(tmp_path / "reproduce-cpu.jsonl", records).parent)
    assert (
        "is of another machine or torch, so that rounding differs too: apex_rank, seed 1." in page
    )
    assert "NVIDIA H200, torch 2.7.0 and cpu, 2 threads, torch 2.7.0;" in page


def test_the_batches_until_the_constant_rate_is_reached(tmp_path):
    arms = {"vanilla_constant": [4.0, 3.0], "vanilla_stagewise": [3.0, 2.5], "apex_rank": [4, 2]}
    settings = {"vanilla_constant": {"schedule": "constant"}, "apex_rank": APEX}
    records = [
        make_record(arm, 1, [5.0, *losses], settings=settings.get(arm))
        for arm, losses in arms.items()
    ]
    write_records(tmp_path / "reproduce-gpu.jsonl", records)
    page = make_results.make_page(tmp_path)
    assert (
        "with decay after 50 % of the batches, by APEX after 75 % of the batches (paper: 33 %)"
        in page
    )
    assert "one seed, so without an interval" in page and "degrees of freedom" not in page


def test_what_is_missing_of_a_campaign_that_has_begun_is_pending(tmp_path):
    arms = [("vanilla_stagewise", 3), ("apex_rank", 2)]
    done = [(arm, seed + 1) for arm, count in arms for seed in range(count)]
    records = [make_record(arm, seed, [2, 1], ends=[100]) for arm, seed in done]
    write_records(tmp_path / "reproduce-gpu.jsonl", records)
    told = make_results.make_page(tmp_path).partition("## Pending")[2]
    told = " ".join(told.split())
    assert "- **Campaign `gpu`, question `main`**: 5 of 30 runs are in. Missing (seeds): " in told
    assert "`vanilla_constant` (1, 2, 3), `apex_rank` (3), `apex_random` (1, 2, 3), " in told
    assert "`vanilla_stagewise` (" not in told and "`scratch`, " in told
    assert 'CAMPAIGN="--study main"' in told
    assert "`stage_count`" not in told  # of several stages, which this scale has not
    assert pending_runs.runs_of("stage_count", "cpu")  # of four too, one more than that scale has
    whole = [
        make_record(arm, seed, [2, 1], ends=[100], study=study)
        for study in make_results.studies()
        for arm, seed in pending_runs.runs_of(study, "gpu")
    ]
    write_records(tmp_path / "reproduce-gpu.jsonl", whole)
    assert "`gpu`" not in make_results.make_page(tmp_path).partition("## Pending")[2]


def test_runs_that_diverged_are_no_missing_ones(tmp_path):
    records = [make_record("vanilla_stagewise", 1, [2, 1], ends=[100])]
    write_records(tmp_path / "reproduce-gpu.jsonl", records)
    lost = {"study": "main", "arm": "apex_rank", "seed": 1, "diverged": "loss is nan at batch 7"}
    write_records(tmp_path / "reproduce-gpu.diverged.jsonl", [lost])
    told = " ".join(make_results.make_page(tmp_path).split())
    assert "Diverged, so without a result: `apex_rank` (1)." in told
    assert "`apex_rank` (2, 3)," in told and "1 of 30 runs are in." in told


def test_the_page_says_how_to_run_a_campaign_with_every_option(capsys):
    section = make_results.make_page().partition("## How to run it")[2].partition("\n## ")[0]
    with pytest.raises(SystemExit):
        reproduce.campaign.parse(["--help"])
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    campaigns = section.replace("--vocabulary 8192 --domain-bytes 80000000", "")
    assert set(re.findall(r"--[a-z]+", campaigns)) == known
    needs = SIZES["gpu"].text
    assert f"--vocabulary {needs.vocabulary} --domain-bytes {needs.domain_bytes}" in section
    assert all(f"`{study}`" in section for study in make_results.studies())


def test_of_several_gpu_files_the_newest_with_a_part_counts(tmp_path):
    (path,) = (ROOT / "benchmarks" / "results").glob("2026-11-26-nvidia-h100-80gb-hbm3.json")
    shutil.copy(path, tmp_path / "2026-11-26-one.json")
    results = json.loads(path.read_text())
    results["machine"]["commit"] += "+changes"
    results["machine"] |= {"date": "2026-12-01T00:00:00+00:00", "device": "NVIDIA H200"}
    del results["parts"]["bandwidth"], results["parts"]["correctness"]
    (tmp_path / "2026-12-01-two.json").write_text(json.dumps(results))
    page = make_results.make_page(tmp_path)
    assert "; commit f754e36 with changes; all" in page
    step, kernels = page.split("**Kernels.**")
    assert "NVIDIA H200" in step and "2026-12-01-two.json" in step and "H100" not in step
    assert "NVIDIA H100" in kernels and "2026-11-26-one.json" in kernels
    assert "| `apex_kernels` | 6.665 | 39,333 | +1.40 % (+1.29 to +1.67) |" in page


def test_parts_of_an_older_commit_are_named(tmp_path):
    """A page that showed them under the newest one's would say what nobody has measured."""
    whole = next((ROOT / "benchmarks" / "results").glob("*-nvidia-*hbm3.json"))
    old = json.loads(whole.read_text())
    new = {"machine": {**old["machine"], "commit": "b" * 40, "date": "2999-01-01T00:00:00"}}
    new["parts"] = {"bandwidth": old["parts"]["bandwidth"]}
    for name, content in (("2026-01-01-old.json", old), ("2999-01-01-new.json", new)):
        (tmp_path / name).write_text(json.dumps(content))
    found = "\n".join(gpu_results.gpu_sections(tmp_path))
    assert "**Of an older commit than the rest: training step and correctness.**" in found
    assert f"commit {old['machine']['commit'][:7]}" in found and "commit bbbbbbb" in found


def test_goals_that_a_step_misses_are_said_to_be_missed():
    page = " ".join(make_results.PAGE.read_text().split())
    assert "Missed: `apex_kernels / vanilla` +1.40 % (goal <= +0.3 %), `apex_kernels_fused" in page
    part = {"lines": [{"what": "a / b", "found": "-2 %", "target": "<= -1 %", "met": True}]}
    assert gpu_results.missed(part) == "All are met."
