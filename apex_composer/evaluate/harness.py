"""What lm-evaluation-harness knows of a task, and its tasks on local files instead of the hub's.

Everything of a task stays the harness's own: prompts, shots, metrics. Changed are the source of
its documents and, as far as splits are not read at a number of shots, that they are loaded.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apex_composer.evaluate.local_files import LocalFile, unique
from apex_composer.evaluate.preset import PresetTask

TASKS = Path(__file__).with_name("tasks")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def forbid_network() -> None:
    """Tell the Hugging Face libraries to stay away from the hub; before they are imported.

    They read these variables once, at import, so what is imported already is told as well.
    """
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
    os.environ.update(dict.fromkeys(names, "1"))
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_DATASETS_OFFLINE"),
        ("evaluate.config", "HF_EVALUATE_OFFLINE"),
        ("transformers.utils.hub", "_is_offline_mode"),
    ):
        if hasattr(sys.modules.get(module), name):
            setattr(sys.modules[module], name, True)


class _Kept(logging.Handler):
    """Keeps what the harness logs of wrong data: it goes on, and counts it as wrong answers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.ERROR or message.startswith("Label index"):
            self.messages.append(" ".join(message.split()))


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without the harness's account of what it does; the bars of long work stay.

    Raises:
        ValueError: it has logged an error, or a right answer that is not among the choices.
    """
    import datasets

    logger, kept = logging.getLogger("lm_eval"), _Kept()
    before = logger.level, logger.propagate, datasets.is_progress_bar_enabled()
    logger.addHandler(kept)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.removeHandler(kept)
        level, logger.propagate, bars = before
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
    if kept.messages:
        raise ValueError(f"{len(kept.messages)} times such as: {kept.messages[0][:400]}")


def find_tasks(tasks: Sequence[PresetTask]) -> Any:
    """The harness's TaskManager for these tasks: to read all of its folders takes seconds.

    Raises:
        ValueError: a task is in none of their folders.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / task.folder for task in tasks if task.folder is not None}
    manager = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[*sorted(folders), TASKS]
    )
    for task in tasks:
        if task.task not in manager.task_index:
            raise ValueError(
                f"lm-eval {lm_eval.__version__} has no task {task.task} in "
                f"{root / (task.folder or '')}, and there is none in {TASKS}"
            )
    return manager


def leaf_tasks(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    """The configurations of a task, or of all tasks of a group or tag, by their names."""
    from lm_eval.tasks._index import Kind

    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        children = sorted(entry.tags)
    elif entry.kind is Kind.GROUP:
        children = entry.cfg["task"]
    else:
        return {name: entry.cfg}
    return {leaf: cfg for child in children for leaf, cfg in leaf_tasks(manager, child).items()}


def used_splits(configuration: Mapping[str, Any], shots: int) -> dict[str, int]:
    """Splits that a task reads, with the documents that each must have at least.

    As `Task.eval_docs` and `Task.fewshot_docs` choose them; where it believes that examples and
    questions share a split, the harness draws one more, in case that it is the question itself.
    """
    evaluated = configuration.get("test_split") or configuration["validation_split"]
    settings = configuration.get("fewshot_config") or {}
    if shots == 0 or settings.get("samples") is not None:
        return {evaluated: 1}
    named = settings.get("split") or configuration.get("fewshot_split")
    examples = named or next(configuration[name] for name in SPLITS if configuration.get(name))
    return {evaluated: 1, examples: shots + (named == configuration.get("test_split"))}


def wanted_files(manager: Any, task: PresetTask) -> dict[str, dict[str, LocalFile]]:
    """The files that stand for the hub's data sets of a task: by leaf task and split."""
    return {
        leaf: {
            split: LocalFile(
                configuration["dataset_path"], configuration.get("dataset_name"), split, least
            )
            for split, least in used_splits(configuration, task.shots).items()
        }
        for leaf, configuration in leaf_tasks(manager, task.task).items()
    }


def build_task(
    manager: Any, task: PresetTask, data_dir: Path | None, version: str | None = None
) -> Any:
    """A group of the harness, named by the task's key, with all leaf tasks at its shots.

    Args:
        manager: from `find_tasks`.
        task: what to build.
        data_dir: folder with the `wanted_files`; None: the hub's.
        version: names the files' content: `datasets` keeps what it has read by path and time of
            change, and would take files that were unpacked with another's time for those.

    Raises:
        ValueError: it is a group or tag of several tasks without a rule for one number of all.
    """
    from lm_eval.config.group import AggMetricConfig

    files = wanted_files(manager, task)
    members = []
    for leaf, configuration in leaf_tasks(manager, task.task).items():
        unused = {
            name: None
            for name in SPLITS
            if configuration.get(name) and configuration[name] not in files[leaf]
        }
        member = {"task": leaf, "num_fewshot": task.shots, **unused}
        if data_dir is not None:
            paths = {split: str(file.below(data_dir)) for split, file in files[leaf].items()}
            member |= {
                "dataset_path": "json",
                "dataset_name": version,
                "dataset_kwargs": {"data_files": paths},
            }
        members.append(member)
    whole = manager.task_index[task.task].cfg or {}
    rules = whole.get("aggregate_metric_list", [])
    if not rules and len(members) > 1:
        raise ValueError(
            f"{task.task} is {len(members)} tasks without an aggregate_metric_list, which says how "
            f"to make one number of theirs: name its tasks one by one, {', '.join(files)}"
        )
    with quiet_harness():
        group = manager.load([{"group": task.key, "task": members}])["groups"][task.key]
    # Not among the settings above, which the harness hands on to the members.
    group.aggregate_metric_list = [AggMetricConfig(**rule) for rule in rules]
    return group


def list_files(tasks: Sequence[PresetTask]) -> list[str]:
    """A line for each file that `--data-dir` must have: path, source, documents and fields."""
    manager = find_tasks(tasks)
    wanted = [wanted_files(manager, task).values() for task in tasks]
    files = unique(file for leaves in wanted for leaf in leaves for file in leaf.values())
    return [
        f"{file.below(Path())}\t{file.dataset}\t{file.config or '-'}\t{file.split}\t"
        f"{file.documents} or more\t"
        + "; ".join(f"{name}: {content}" for name, content in file.fields.items())
        for file in files
    ]
