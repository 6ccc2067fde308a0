import json
import math
from pathlib import Path

import pytest
from campaign_records import APEX, make_record, small_campaign, write_records

from apex_composer.report.answers import answer
from apex_composer.report.page import write_report
from apex_composer.report.read_campaign import read_campaign, split_path
from apex_composer.report.read_run import read_runs

SCRATCH = {"base": "c" * 64, "study": "scratch", "settings": {"base": "scratch"}}


def scratch(arm: str, losses, apex=None) -> dict:
    settings = SCRATCH["settings"] | {"apex": apex}
    return make_record(arm, 1, losses, **SCRATCH | {"settings": settings})


def test_a_campaign_is_compared_by_seed(tmp_path):
    path = write_records(tmp_path / "results.jsonl", small_campaign())
    found = answer(read_runs([path]))
    names = [group.name for group in found.groups]
    assert names[-2:] == ["apex_rank", "selection_only"] and set(names[:-2]) == {
        "vanilla_stagewise",
        "vanilla_constant",
    }
    assert found.baselines == ("vanilla_stagewise", "vanilla_constant")
    total = found.finals["apex_rank"]["total"]
    assert total.paired and total.loss_difference.values == pytest.approx((0.001, 0.002, 0.003))
    # The two seeds of it are pairs with two of the baseline's three.
    constant = found.finals["vanilla_constant"]["total"]
    assert constant.paired and constant.loss_difference.values == pytest.approx((0.1, 0.1))
    assert constant.loss.mean == pytest.approx(3.15)
    assert any(line.endswith("the same seeds: vanilla_constant.") for line in found.cautions)
    assert found.sentence.startswith("apex_rank ends at a validation perplexity of")
    assert "3 pairs of seeds" in found.sentence


def test_the_sentence_gives_the_baselines_perplexity_of_the_same_seeds(tmp_path):
    ends = {"vanilla_stagewise": (3.0, 3.1, 2.0), "apex_rank": (3.0, 3.1)}
    records = [
        make_record(arm, seed, [4.0, 3.5, end], settings=APEX if arm == "apex_rank" else None)
        for arm, own in ends.items()
        for seed, end in enumerate(own, 1)
    ]
    found = answer(read_runs([write_records(tmp_path / "results.jsonl", records)]))
    shown = f"{(math.exp(3.0) + math.exp(3.1)) / 2:.3f}"
    assert found.sentence.startswith(
        f"apex_rank ends at a validation perplexity of {shown}, vanilla_stagewise with the same "
        f"2 seeds at {shown}: a difference of +0.000 (+0.00 %)."
    )


def test_a_baseline_that_ends_above_its_start_gives_nothing_to_reach(tmp_path):
    ends = {"vanilla_stagewise": (2.45, 2.47), "apex_rank": (2.46, 2.46), "apex_random": (2.5, 2.5)}
    settings = {"apex_rank": APEX, "apex_random": {"apex": {"method": "random"}}}
    records = [
        make_record(arm, seed, [2.2, end], ends=[100], settings=settings.get(arm))
        for arm, own in ends.items()
        for seed, end in enumerate(own, 1)
    ]
    path = write_records(tmp_path / "results.jsonl", records)
    found = answer(read_runs([path]))
    reach, other = found.reaches
    assert reach.text == other.text
    assert reach.tokens is None and reach.share is None and reach.text in found.sentence
    assert reach.text == (
        "vanilla_stagewise ends no better than it began (2 of 2 seeds), so that the tokens to "
        "reach its final perplexity say nothing."
    )
    write_report([path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count(f"<li>{reach.text}</li>") == 1 and "commit 0123456" in page
    assert "not reached" not in page and "0 and 0" not in page and "Diamonds" not in page


def test_what_a_run_has(tmp_path):
    facts = [{"relative_norm": 0.1}, {"relative_norm": 0.2}]
    settings = {"apex": {"method": "random"}}
    record = make_record("apex_random", 2, [3, 2, 1], settings=settings, stages=facts)
    (run,) = read_runs([write_records(tmp_path / "results.jsonl", [record])])
    assert run.folder == tmp_path / "results.jsonl" / "mixture" / "main" / "apex_random" / "seed2"
    book = run.validation["book"]
    assert book.batches == [0, 100, 200] and book.tokens == [0, 4000, 8000]
    assert book.values == [2.5, 1.5, 0.5] and run.validation_tokens == {"book": 1, "code": 1}
    norm = run.metrics["apex/operator_norm/all sites"]
    assert (norm.batches, norm.values) == ([100, 200], [0.1, 0.2])
    commit = {"this repository": "commit 0123456789abcdef"}
    assert run.device == "cpu, 2 threads" and run.versions == {"torch": "2.7.0"} | commit
    assert run.settings["algorithms.apex.method"] == "random"
    assert run.settings["load_path"] == f"mixture {'b' * 64}" and run.settings["seed"] == 2
    assert run.settings["max_duration"] == "200ba" and run.settings["scale.sizes.hidden"] == 8
    assert not {"study", "name", "averaged"} & set(run.settings)
    assert len(run.missing) == 2


def test_the_average_of_checkpoints_is_a_group_of_its_own(tmp_path):
    settings = {"schedule": "constant", "averaged": True}
    records = [make_record("constant", 1, [3, 2, 1], settings=settings)]
    own = {"ends": [200], "settings": settings, "averaged_batches": [120, 200]}
    records.append(make_record("constant_averaged", 1, [3, 0.9], **own))
    groups = answer(read_runs([write_records(tmp_path / "results.jsonl", records)])).groups
    assert [group.name for group in groups] == ["constant", "constant_averaged"]


def test_bases_are_kept_apart_by_name_and_chosen_by_path(tmp_path):
    records = [*small_campaign(), scratch("vanilla", [9, 8, 7]), scratch("apex", [9, 8, 7], {})]
    path = write_records(tmp_path / "results.jsonl", records)
    every = answer(read_runs([path]))
    assert {group.name.split("/")[0] for group in every.groups} == {"mixture", "scratch"}
    assert all(name.startswith("mixture/") for name in every.baselines)
    assert any("begins with other weights" in line for line in every.cautions)
    own = answer(read_runs([path / "scratch"]))
    assert [group.name for group in own.groups] == ["vanilla", "apex"]
    assert own.baselines == ("vanilla",)
    two = read_runs([path / "mixture" / "main" / "vanilla_constant", path / "mixture" / "main"])
    assert len(two) == 11 and len({run.folder for run in two}) == 11
    with pytest.raises(FileNotFoundError, match="mixture/rates/a is no run. There: main"):
        read_runs([path / "mixture" / "rates" / "a"])


def test_bases_of_one_kind_have_their_hash(tmp_path):
    records = [make_record("vanilla", 1, [3, 2, 1], base=letter * 64) for letter in "de"]
    again = make_record("vanilla", 1, [3, 2, 1], base="d" * 64, settings={"rate": 2.0})
    path = write_records(tmp_path / "results.jsonl", [*records, again])
    folders = {"/".join(run.folder.parts[-4:]) for run in read_runs([path])}
    assert folders == {
        "mixture-dddddddd/main/vanilla/seed1",
        "mixture-dddddddd/main/vanilla/seed1-2",
        "mixture-eeeeeeee/main/vanilla/seed1",
    }


def test_the_page_of_a_campaign(tmp_path):
    path = write_records(tmp_path / "results.jsonl", small_campaign())
    write_report([path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Validation loss: total" in page and "Operator norm: all sites" in page
    assert "3 seeds" in page and "2 seeds" in page and "tokens trained (k)" in page


def test_damage_is_named(tmp_path):
    path = write_records(tmp_path / "results.jsonl", small_campaign())
    whole = path.read_text()
    path.write_text(whole + '{"arm": "torn')
    assert len(read_runs([path])) == 11  # what a killed campaign has left does not count
    path.write_text("{\n" + whole)
    with pytest.raises(ValueError, match="results.jsonl:1 is damaged.*Remove this line"):
        read_runs([path])
    for damage in ({"stage_ends": [100]}, {"settings": {}}, {"losses": []}, {"machine": None}):
        path.write_text(json.dumps(small_campaign()[0] | damage) + "\n")
        with pytest.raises(ValueError, match="holds no results of a campaign"):
            read_campaign(path)
    path.write_text("")
    with pytest.raises(FileNotFoundError, match="It has no whole line"):
        read_runs([path])


def test_only_files_of_campaigns_are_taken_for_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    assert split_path(tmp_path / "metrics.jsonl") is None
    assert split_path(tmp_path / "folder.jsonl" / "run") is None
    assert split_path(tmp_path / "a.jsonl" / "x" / "y") == (tmp_path / "a.jsonl", ("x", "y"))
    assert split_path(Path("nowhere.jsonl")) is None


def test_apex_as_it_is_comes_before_what_varies_it(tmp_path):
    varied = make_record("varied", 1, [3, 2, 1], settings=APEX | {"variation": {"rate": 10}})
    records = [varied, make_record("apex", 1, [3, 2, 1], settings=APEX)]
    records.append(make_record("vanilla", 1, [3, 2, 1]))
    runs = read_runs([write_records(tmp_path / "results.jsonl", records)])
    assert [run.name for run in runs] == ["vanilla", "apex", "varied"]
    assert runs[2].settings["variation.rate"] == 10
