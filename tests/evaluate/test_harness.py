import json
import os
import sys

import datasets
import pytest
from documents import document

from apex_composer.evaluate.harness import (
    build_task,
    find_tasks,
    forbid_network,
    leaf_tasks,
    list_files,
    quiet_harness,
    wanted_files,
)
from apex_composer.evaluate.local_files import LocalFile
from apex_composer.evaluate.preset import PresetTask, read_preset

# One leaf task of each group of the presets; the harness makes the others of the same template.
LEAVES = {"mmlu": "mmlu_anatomy", "bbh_cot_fewshot": "bbh_cot_fewshot_navigate"}
LEAVES["tydiqa"] = "tydiqa_goldp_fi"
PRESET_TASKS = {
    task.key: PresetTask(LEAVES.get(task.task, task.task), "", task.shots, "", task.folder)
    for name in ("cpt", "instruct")
    for task in read_preset(name).tasks
}
SPLITS = {"train": range(10, 50), "validation": range(50, 53), "test": range(60, 62)}
SPLITS["dev"] = range(70, 75)


def requests_of(group):
    (task,) = group.get_all_tasks()
    task.set_fewshot_seed(seed=1234)
    with quiet_harness():
        task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.fixture(scope="module")
def read_from_hub():
    """`datasets.load_dataset` for the names on the hub, with all splits; else the real one."""
    real = datasets.load_dataset

    def load(path, name=None, **options):
        if path == "json":
            return real(path=path, name=name, **options)
        split = {
            split: datasets.Dataset.from_list([document(path, number) for number in numbers])
            for split, numbers in SPLITS.items()
        }
        return datasets.DatasetDict(split)

    return load


@pytest.mark.parametrize("key", PRESET_TASKS)
def test_prompts_are_the_harnesss_own(key, tmp_path, monkeypatch, read_from_hub):
    """From local files, with the fields and splits that are asked for and no others."""
    task = PRESET_TASKS[key]
    manager = find_tasks([task])
    for file in wanted_files(manager, task)[task.task].values():
        path = file.below(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(document(file.dataset, number)) for number in SPLITS[file.split]]
        path.write_text("\n".join(lines) + "\n")
        assert {*document(file.dataset, 0)} == {*file.fields} and file.problem(tmp_path) is None
    local = requests_of(build_task(manager, task, tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", read_from_hub)
    own = {"group": "own", "task": [{"task": task.task, "num_fewshot": task.shots}]}
    with quiet_harness():
        hub = requests_of(manager.load([own])["groups"]["own"])
    assert local == hub and len(local) >= 2
    if task.shots and task.task not in ("gsm8k_cot", LEAVES["bbh_cot_fewshot"]):
        examples = SPLITS["dev" if task.task == "mmlu_anatomy" else "train"]
        drawn = [f"w{number} first" in local[0][0] for number in examples]
        assert sum(drawn) == task.shots


def test_files_are_those_that_are_read_at_a_number_of_shots():
    task = PresetTask("arc_challenge", "", 25, "acc", "arc")
    test = LocalFile("allenai/ai2_arc", "ARC-Challenge", "test")
    train = LocalFile("allenai/ai2_arc", "ARC-Challenge", "train", 25)
    manager = find_tasks([task])
    assert wanted_files(manager, task) == {"arc_challenge": {"test": test, "train": train}}
    none = PresetTask("arc_challenge", "", 0, "acc", "arc")
    assert wanted_files(manager, none) == {"arc_challenge": {"test": test}}
    (line, _) = list_files([none, task])
    assert line.startswith("allenai/ai2_arc/ARC-Challenge/test.jsonl\tallenai/ai2_arc\tARC-Chall")
    assert line.endswith(
        "question: text; choices: " + test.fields["choices"] + "; answerKey: one of the labels"
    )


def test_groups_have_all_their_leaf_tasks():
    tasks = [*read_preset("instruct").tasks]
    manager = find_tasks(tasks)
    numbers = {task.task: len(leaf_tasks(manager, task.task)) for task in tasks}
    assert numbers == {
        **{"mmlu": 57, "bbh_cot_fewshot": 27, "tydiqa": 9, "gsm8k_cot": 1},
        **{"truthfulqa_mc2": 1, "humaneval_pass_at_10": 1},
    }


def test_a_tag_without_a_number_for_all_is_refused(data_dir):
    task = PresetTask("tydiqa_goldp", "", 1, "f1", "tydiqa")
    with pytest.raises(ValueError, match="is 9 tasks without an aggregate_metric_list"):
        build_task(find_tasks([task]), task, data_dir)


def test_libraries_are_told_to_stay_away_from_the_hub(monkeypatch):
    import huggingface_hub.constants

    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
    ):
        monkeypatch.setattr(sys.modules[module], name, False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    forbid_network()
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_EVALUATE_OFFLINE"] == "1"


def test_one_example_more_is_wanted_where_the_harness_draws_it():
    """Of a task without a test split; MMLU has exactly the five examples that it needs."""
    tasks = {task.key: task for task in read_preset("cpt").tasks}
    manager = find_tasks([*tasks.values()])
    questions = wanted_files(manager, tasks["nq_open-32"])["nq_open"]
    assert {split: file.documents for split, file in questions.items()} == {
        "validation": 1,
        "train": 33,
    }
    assert wanted_files(manager, tasks["mmlu-5"])["mmlu_anatomy"]["dev"].documents == 5
