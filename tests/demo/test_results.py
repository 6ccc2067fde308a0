import io
import json
import math

import pytest
from results_fixture import PREPARED, example_summary
from rich.console import Console

from apex_composer.demo.results import perplexities, step_times
from apex_composer.demo.table import make_table


def test_the_total_weighs_domains_by_their_tokens():
    found = perplexities({"a": 1.0, "b": 3.0}, {"a": 300, "b": 100})
    assert found["total"] == pytest.approx(math.exp(1.5))
    assert found["domains"] == {"a": pytest.approx(math.e), "b": pytest.approx(math.exp(3))}


def test_step_times_are_quartiles():
    assert step_times([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
    }


def test_the_summary_has_what_the_readme_promises_and_is_json():
    summary = json.loads(json.dumps(example_summary()))
    for run in ("base", "vanilla", "apex"):
        assert set(summary[f"{run}_ppl"]) == {"total", "domains"}
        assert set(summary[f"{run}_ppl"]["domains"]) == {"arxiv", "github"}
    assert summary["step_time_ratio"] == pytest.approx(1.5)
    assert summary["data"]["predicted_validation_tokens"] == {"arxiv": 30, "github": 10}
    assert summary["seeds"] == {"training": 17, "data_order": 17}
    assert [stage["start_batch"] for stage in summary["stages"]] == [0, 4, 8]
    assert {"python", "torch", "mosaicml", "apex-composer"} <= set(summary["versions"])


def printed(summary):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(make_table(summary))
    return console.export_text()


def test_the_table_shows_every_domain_and_the_total():
    text = printed(example_summary())
    for expected in ("arxiv", "github", "total", "7.389", "ratio 1.500"):
        assert expected in text
    assert "training only" not in text and "sections" not in text


def test_the_table_says_which_domains_are_for_training_only():
    splits = dict(PREPARED.splits)
    splits["pretrain"] = splits["pretrain"] | {"book": {"tokens": 99, "sequences": 9}}
    text = printed(example_summary(splits=splits, domains=["arxiv", "book", "github", "tiny"]))
    rows = {line.split()[1]: line for line in text.splitlines() if " 0 " in line}
    assert "training only" in rows["book"] and "too little text" in rows["tiny"]
    assert "sections of the same documents" in printed(example_summary(are_sections=True))
