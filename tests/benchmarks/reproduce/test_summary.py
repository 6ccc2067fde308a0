import pytest
from campaign_records import APEX, MACHINE, make_record, small_campaign, write_records
from reproduce.summary import (
    across_machines,
    differences_table,
    domains_table,
    facts_table,
    losses_table,
    main,
    noise_table,
    provenance,
    studies_of,
)


def rows(table) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


def test_the_tables_of_a_small_campaign():
    (study,) = studies_of(small_campaign())
    assert study.title == "main, cpu, base mixture bbbbbbbb"
    table = differences_table(study)
    assert table.head[3:] == ["stage 1", "end", "perplexity at the end"]
    found = rows(table)
    assert list(found)[0] == "vanilla_stagewise"
    assert found["vanilla_stagewise"] == ["–", "3", "3.2000 ± 0.2484", "3.1000 ± 0.2484", "–"]
    assert found["apex_rank"] == [
        "vanilla_stagewise", "3", "+0.02000 ± 0.02484", "+0.00200 ± 0.00248",
        "+0.20 % (−0.05 to +0.45)",
    ]  # fmt: skip
    assert found["vanilla_constant"][1] == "2"
    assert rows(losses_table(study))["apex_rank"] == ["1, 2, 3", "3.5000", "3.2200", "3.1020"]
    assert rows(domains_table(study))["apex_rank"][1:] == ["+0.00200 ± 0.00248"] * 2
    noise = rows(noise_table(study))
    assert noise["apex_rank"][1:] == ["0.00100 (2)", "3"]
    assert noise["selection_only"][1:] == ["–", "–"] and noise["all"][1] == "0.00082 (3)"
    assert facts_table(study).rows == [["apex_rank", "relative_norm", "0.02", "0.04"]]


def test_arms_of_fewer_stages_stand_in_the_right_columns():
    records = [make_record("vanilla_stagewise", seed, [3, 2, 1.5]) for seed in (1, 2)]
    records.append(make_record("one_stage", 1, [3, 1.25], ends=[200], settings={"stages": 1}))
    (study,) = studies_of(records)
    found = rows(differences_table(study))["one_stage"]
    assert found == ["vanilla_stagewise", "1", "–", "−0.25000", "−22.12 %"]
    assert rows(losses_table(study))["one_stage"] == ["1", "3.0000", "–", "1.2500"]
    assert facts_table(study) is None


def test_a_question_takes_its_baseline_from_another_one():
    records = [make_record("vanilla_stagewise", seed, [3, 2, 1.5]) for seed in (1, 2)]
    records.append(make_record("apex", 2, [3, 2, 1.4], study="norms", settings=APEX))
    main_study, norms = studies_of(records)
    assert (main_study.name, norms.name) == ("main", "norms")
    assert list(rows(differences_table(norms))) == ["vanilla_stagewise", "apex"]
    assert [runs.arm for runs, _ in main_study.arms] == ["vanilla_stagewise"]


def test_fresh_seeds_are_not_put_together_with_those_that_chose():
    fast = {"rate": 2.0}
    records = [
        make_record(arm, seed, [3, 2, loss], settings=settings, study=study)
        for study, seeds, better in (("main", (1, 2), 0.5), ("confirm", (101, 102), 0.0))
        for seed in seeds
        for arm, loss, settings in (
            ("vanilla_stagewise", 1.5, {}),
            ("vanilla_fast", 1.5 - better, fast),
            ("apex_fast", 1.5 - better, fast | APEX),
        )
    ]
    _, confirm = studies_of(records)
    found = rows(differences_table(confirm))
    assert found["vanilla_fast"] == ["vanilla_stagewise", "2", "0", "0", "0"]
    assert found["apex_fast"][:2] == ["vanilla_fast", "2"]


def test_facts_within_facts_have_their_whole_name():
    facts = [{"norms": {"heads": {"std": 0.5}}}, {"norms": {"heads": {"std": 0.25}}, "x": [1]}]
    (study,) = studies_of([make_record("apex", 1, [3, 2, 1], settings=APEX, stages=facts)])
    assert facts_table(study).rows == [
        ["apex", "norms.heads.std", "0.5", "0.25"],
        ["apex", "x", "–", "–"],
    ]


def test_bases_are_never_in_one_table():
    other = {"base": "c" * 64, "settings": {"base": "scratch"}, "study": "scratch"}
    records = [*small_campaign(), make_record("scratch_vanilla", 1, [6, 5, 4], **other)]
    found = studies_of(records)
    assert [study.title for study in found] == [
        "main, cpu, base mixture bbbbbbbb",
        "scratch, cpu, base scratch cccccccc",
    ]
    assert len(found[1].arms) == 1


def test_where_results_come_from():
    records = small_campaign()
    records[-1]["date"] = "2026-11-27T00:00:00+00:00"
    assert provenance(records) == (
        "`python benchmarks/reproduce/campaign.py cpu --study main`; cpu, 2 threads, torch 2.7.0; "
        "2026-11-26 to 2026-11-27; commit 0123456; base mixture bbbbbbbb, 12,000 batches; "
        "text tttttttt; seeds 1, 2, 3"
    )


def test_pairs_of_different_machines_are_told():
    records = small_campaign()
    (study,) = studies_of(records)
    assert across_machines(study) == ""
    other = {**MACHINE, "device": "NVIDIA H200"}
    records = [one | ({"machine": other} if one["seed"] == 3 else {}) for one in records]
    (study,) = studies_of(records)
    assert across_machines(study) == ""  # both of a pair are of one machine
    records[-1]["machine"] = {**MACHINE, "versions": {"torch": "2.8.0"}}
    (study,) = studies_of(records)
    assert across_machines(study) == (
        "Pairs of which one run is of another machine or torch, so that rounding differs too: "
        "selection_only, seed 3."
    )


def test_a_commit_with_changes_is_told_from_the_commit():
    commits = ("0123456789+changes", "0123456789", None)
    machines = [{**MACHINE, "commit": commit} for commit in commits]
    facts = {"texts_facts": {"source": "text installed with Python"}}
    records = [make_record("a", 1, [3, 2, 1], machine=one, **facts) for one in machines]
    told = provenance(records)
    assert "commit 0123456, 0123456 with changes, unknown;" in told
    assert "; text tttttttt (text installed with Python);" in told


def test_a_cpu_that_is_not_named_is_said_to_be_none():
    machine = {**MACHINE, "device": "CPU (interpreted)"}
    told = provenance([make_record("a", 1, [3, 2, 1], machine=machine)])
    assert "; a CPU that the results do not name, torch 2.7.0;" in told
    named = machine | {"device": "Some CPU", "cores": 2, "threads": 1}
    told = provenance([make_record("a", 1, [3, 2, 1], machine=named)])
    assert "; Some CPU (2 cores, threads of a run: 1), torch 2.7.0;" in told


def test_a_table_s_command_is_without_what_its_sitting_made_of_other_tables():
    sitting = "python campaign.py cpu --study main rates --arms a b c --seeds 1 --data pile"
    own = {"command": sitting, "study": "rates"}
    records = [make_record(arm, 1, [3, 2, 1], **own) for arm in ("a", "c")]
    assert provenance(records).startswith(
        "`python campaign.py cpu --study rates --arms a c --seeds 1 --data pile`; "
    )


def test_the_command_prints_every_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    path = write_records(tmp_path / "results.jsonl", small_campaign())
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "+0.02000 ± 0.02484" in printed and "commit 0123456" in printed
    assert main([str(path), "--markdown", "--study", "main"]) == 0
    printed = capsys.readouterr().out
    assert "| apex_rank | vanilla_stagewise | 3 | +0.02000 ± 0.02484 |" in printed
    with pytest.raises(SystemExit):
        main([str(path), "--study", "none"])
    assert "--study: got none; the files have main" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "missing.jsonl")])
    assert "no results in" in capsys.readouterr().err
