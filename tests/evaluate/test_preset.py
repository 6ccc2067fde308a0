from statistics import fmean

import pytest
import yaml

from apex_composer.evaluate.harness import find_tasks, leaf_tasks, wanted_files
from apex_composer.evaluate.preset import PRESETS, choose_tasks, read_preset


@pytest.mark.parametrize("name", PRESETS)
def test_the_harness_knows_every_task_and_its_metric(name):
    preset = read_preset(name)
    manager = find_tasks(preset.tasks)
    for task in preset.tasks:
        for leaf in leaf_tasks(manager, task.task).values():
            filters = [one["name"] for one in leaf.get("filter_list") or [{"name": "none"}]]
            names = [metric["metric"] for metric in leaf["metric_list"]]
            metric, comma, which = task.metric.partition(",")
            assert metric in names and (which in filters if comma else len(filters) == 1), task
        for files in wanted_files(manager, task).values():
            assert all(file.fields for file in files.values()), task


@pytest.mark.parametrize(("name", "tolerance"), [("cpt", 0.051), ("instruct", 0.11)])
def test_the_papers_averages_are_those_of_its_numbers(name, tolerance):
    """Typing errors in the presets would show; the paper's own rounding is not exact."""
    preset = read_preset(name)
    shares = slice(int(preset.columns[0] == "perplexity"), None)
    for row in preset.rows:
        assert fmean(row.numbers[shares]) == pytest.approx(row.average, abs=tolerance), row


def test_tasks_are_chosen_by_name_or_with_their_shots():
    preset = read_preset("cpt")
    keys = [task.key for task in preset.tasks]
    assert [task.key for task in choose_tasks(preset)] == keys
    chosen = choose_tasks(preset, ["boolq", "nq_open-32"], ["boolq-0"])
    assert [task.key for task in chosen] == ["boolq-32", "nq_open-32"]
    with pytest.raises(ValueError, match="boolq-5: no task of preset cpt. Did you mean 'boolq-"):
        choose_tasks(preset, ["boolq-5"])
    with pytest.raises(ValueError, match="sciqq: no task of preset cpt. Did you mean 'sciq'?"):
        choose_tasks(preset, skip=["sciqq"])


def test_a_preset_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--preset ctp: there is none. Allowed are cpt, instruct"):
        read_preset("ctp")
    path = tmp_path / "own.yaml"
    for content in ("title: x", "- 1", "tasks: [{task: sciq}]", "a: ["):
        path.write_text(content)
        with pytest.raises(ValueError, match="own.yaml is no preset"):
            read_preset(str(path))
    paper = {"source": "", "columns": ["A"], "rows": [{"method": "B", "numbers": []}]}
    path.write_text(yaml.safe_dump({"title": "x", "tasks": [], "paper": paper}))
    with pytest.raises(ValueError, match="'B' has not one number for each of its columns"):
        read_preset(str(path))


def test_a_task_that_the_harness_has_not_is_refused(preset):
    task = read_preset(str(preset)).tasks[0]
    with pytest.raises(ValueError, match="lm-eval 0.4.13 has no task piqa in .*sciq"):
        find_tasks([type(task)("piqa", "PIQA", 0, "acc", "sciq")])
