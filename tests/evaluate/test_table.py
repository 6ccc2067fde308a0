import copy
import math

from apex_composer.evaluate.preset import PaperRow, Preset, PresetTask
from apex_composer.evaluate.table import as_markdown, measured, metric_table, notes, paper_table

TASKS = [
    PresetTask("sciq", "SciQ", 0, "acc"),
    PresetTask("boolq", "BoolQ", 0, "acc"),
    PresetTask("boolq", "BoolQ", 32, "acc"),
]
COLUMNS = ["perplexity", "SciQ", "BoolQ"]
ROWS = [
    PaperRow("Vanilla", [5.8, 86.6, 62.1], 74.4),
    PaperRow("APEX", [5.4, 88.5, 62.9], short="paper APEX"),
]
PRESET = Preset("x", "Title", TASKS, "a table", COLUMNS, ROWS)


def result(value, *, limit=None, cut=0, **more):
    metrics = {"acc,none": {"value": value, "stderr": 0.0125}, **more}
    identity = {"limit": limit, "max_length": 2048}
    counts = {"documents": 40, "requests": 160, "cut_prompts": cut}
    return {"identity": identity, "metrics": metrics, **counts}


RESULTS = {
    "models": {
        "runs/a/hf": {
            "tasks": {
                "sciq-0": result(0.875, **{"acc_norm,none": {"value": 0.5, "stderr": None}}),
                "boolq-0": result(0.6, limit=40, cut=7),
            },
            "problems": {"boolq-32": "ValueError: no"},
        },
        "runs/b/hf": {
            "tasks": {"sciq-0": result(0.25, **{"perplexity,none": {"value": 7.3, "stderr": 0.2}})},
            "problems": {},
            "perplexity": {
                "total": {"loss": math.log(5), "error": 0.01, "tokens": 1500, "sequences": 4},
                "domains": {
                    "wiki": {"loss": math.log(2), "error": None, "tokens": 500, "sequences": 1}
                },
            },
        },
    }
}


def test_the_papers_layout_has_models_and_the_papers_rows():
    assert paper_table(RESULTS, PRESET, TASKS) == [
        ["model", "PPL", "SciQ 0-shot", "BoolQ 0-shot", "BoolQ 32-shot", "average"],
        ["runs/a/hf", "–", "87.5 ± 1.2", "60.0 ± 1.2 (trial)", "failed", "73.8 (trial)"],
        ["runs/b/hf", "5.00", "25.0 ± 1.2", "–", "–", "–"],
        ["Vanilla", "5.8", "86.6", "62.1", "62.1", "74.4"],
        ["APEX", "5.4", "88.5", "62.9", "62.9", "–"],
    ]


def test_every_metric_and_domain_has_a_row_and_the_papers_numbers_stand_beside_theirs():
    assert metric_table(RESULTS, PRESET, TASKS) == [
        ["task-shots", "metric", "runs/a/hf", "runs/b/hf", "paper APEX"],
        ["perplexity", "total", "–", "5.000 ± 0.050 (1,500 tokens)", "5.4"],
        ["perplexity", "wiki", "–", "2.000 (500 tokens)", "–"],
        ["sciq-0", "acc", "87.5 ± 1.2", "25.0 ± 1.2", "88.5"],
        ["sciq-0", "acc_norm", "50.0", "–", "–"],
        ["sciq-0", "perplexity", "–", "7.30 ± 0.20", "–"],
        ["boolq-0", "acc", "60.0 ± 1.2 (trial)", "–", "62.9"],
    ]


def test_models_are_called_by_the_end_of_their_paths_where_that_tells_them_apart():
    one = {"models": {"runs/a/one": RESULTS["models"]["runs/a/hf"]}}
    assert paper_table(one, PRESET, TASKS)[1][0] == "one"
    assert metric_table(one, PRESET, TASKS)[0][2] == "one"


def test_notes_tell_what_the_numbers_are_not():
    assert notes(RESULTS, PRESET, TASKS)[1:] == [
        "The average has the fewer shots of BoolQ.",
        "The paper's numbers: a table.",
        "A number marked (trial) is of the first documents only, by --limit: no result.",
        "runs/a/hf, boolq-0: 7 of 160 prompts were cut at their start to 2048 tokens.",
        "runs/a/hf, boolq-32: not evaluated, ValueError: no",
    ]


def test_numbers_that_were_got_in_different_ways_are_told():
    unlike = copy.deepcopy(RESULTS)
    first, second = unlike["models"].values()
    assert not any("evaluated alike" in line for line in notes(unlike, PRESET, TASKS))
    first["tasks"]["sciq-0"]["identity"] |= {"chat": True, "model": {"dtype": "float32"}}
    second["tasks"]["sciq-0"]["identity"] |= {"chat": False, "model": {"dtype": "bfloat16"}}
    assert notes(unlike, PRESET, TASKS)[5] == (
        "sciq-0: the models were not evaluated alike, which makes their numbers no comparison: "
        "chat, dtype."
    )


def test_a_domain_may_be_called_total():
    results = copy.deepcopy(RESULTS)
    measured_ = results["models"]["runs/b/hf"]["perplexity"]
    measured_["domains"] = {"total": measured_["domains"]["wiki"]}
    assert [row[3] for row in metric_table(results, PRESET, TASKS)[1:3]] == [
        "5.000 ± 0.050 (1,500 tokens)",
        "2.000 (500 tokens)",
    ]


def test_a_metric_is_named_with_or_without_its_filter():
    metrics = ["exact_match,strict", "exact_match,flexible", "acc_norm,none"]
    assert measured(metrics, "exact_match,flexible") == "exact_match,flexible"
    assert measured(metrics, "acc_norm") == "acc_norm,none"
    assert measured(metrics, "acc") is None


def test_markdown_keeps_a_bar_in_a_cell():
    assert as_markdown([["a", "b"], ["x|y", "z"]]) == "| a | b |\n|---|---|\n| x\\|y | z |"
