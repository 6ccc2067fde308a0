"""Models on the tasks of a preset, one result file, which an interrupted call goes on with."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from apex_composer.callbacks.run_facts import versions
from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.evaluate.harness import build_task, find_tasks, leaf_tasks, wanted_files
from apex_composer.evaluate.held_out import measure_held_out
from apex_composer.evaluate.identity import describe_model
from apex_composer.evaluate.local_files import LocalFile, describe_problems, sha256_of, unique
from apex_composer.evaluate.preset import PresetTask
from apex_composer.evaluate.run_task import SEEDS, run_task, wrap_model
from apex_composer.evaluate.table import PERPLEXITY

# What a result depends on.
PACKAGES = ("apex-composer", "lm-eval", "torch", "transformers", "tokenizers", "datasets")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        data_dir: folder of local copies of the data; None: from the hub.
        limit: documents of each task, for a trial; None: all.
        batch_size: sequences at once.
        max_length: tokens of a prompt with its answer; None: the model's positions.
        run_code: whether programs that the model writes may be run.
        chat: whether prompts take the form of the tokenizer's chat template, each example a turn.
        texts: held-out text for the perplexity, if any.
        sequence_length: tokens of a sequence of it.
    """

    data_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    run_code: bool = False
    chat: bool = False
    texts: Path | None = None
    sequence_length: int = 4096


def find_problems(manager: Any, tasks: Sequence[PresetTask], settings: Settings) -> list[str]:
    """What will keep tasks from running, as far as it can be known without a model."""
    problems = [
        f"{task.key}: it runs Python programs that the model writes. --run-generated-code allows "
        "that, with your rights on this machine"
        for task in tasks
        if not settings.run_code
        and any(leaf.get("unsafe_code") for leaf in leaf_tasks(manager, task.task).values())
    ]
    if settings.data_dir is None:
        return problems
    for task in tasks:
        files = unique(_files(manager, task))
        problems += [f"{task.key}: {line}" for line in describe_problems(files, settings.data_dir)]
    return problems


def _files(manager: Any, task: PresetTask) -> list[LocalFile]:
    return [file for leaf in wanted_files(manager, task).values() for file in leaf.values()]


class Evaluation:
    """The tasks on one model after the other; what is done stands in a file at once.

    Args:
        tasks: to be run.
        settings: how.
        path: the result file; an earlier one is gone on with, results of other models stay.
        tell: gets a line for each thing that is done or found.
    """

    def __init__(
        self, tasks: Sequence[PresetTask], settings: Settings, path: Path, tell: Tell = print
    ) -> None:
        self.tasks, self.settings, self.path, self.tell = tasks, settings, path, tell
        self.manager = find_tasks(tasks)
        self.results = self._read()
        self.hashes: dict[Path, str] = {}

    def evaluate(
        self, source: str, open_model: Callable[[str], AbstractContextManager[Any]]
    ) -> list[str]:
        """Run the tasks on a model.

        Args:
            source: names it in the results.
            open_model: gives an object with `.model` and `.tokenizer`, and closes it.

        Returns:
            A line for every task that could not be run.
        """
        with open_model(source) as opened:
            description = describe_model(opened.model, opened.tokenizer)
            record = self.results["models"].setdefault(source, {"tasks": {}})
            before = record.get("model", description)
            if before != description:  # other weights under the same name
                changed = [name for name in description if before.get(name) != description[name]]
                self.tell(f"{source}: its earlier results go, being of other {', '.join(changed)}")
                record = self.results["models"][source] = {"tasks": {}}
            record |= {"model": description, "problems": {}}
            self._write(source, record)
            model = wrap_model(
                opened.model, opened.tokenizer, self.settings.batch_size, self.settings.max_length
            )
            if self.settings.texts is not None:
                self.tell(f"{source}: {PERPLEXITY} of {self.settings.texts}")
                self._attempt(source, record, PERPLEXITY, partial(self._measure, opened, record))
            for number, task in enumerate(self.tasks, 1):
                self.tell(f"{source}: {task.key} ({number} of {len(self.tasks)})")
                self._attempt(source, record, task.key, partial(self._run, model, task, record))
        return [f"{source}, {key}: {reason}" for key, reason in record["problems"].items()]

    def _read(self) -> dict[str, Any]:
        return (read_json(self.path) or {"models": {}}) | {"versions": versions(PACKAGES)}

    def _write(self, source: str, record: dict[str, Any]) -> None:
        """Write what is known of a model, beside what another call has written meanwhile."""
        self.results = self._read()
        self.results["models"][source] = record
        write_json(self.path, self.results)

    def _attempt(
        self, source: str, record: dict[str, Any], key: str, run: Callable[[], None]
    ) -> None:
        """Run one part and write what is known; trouble of any kind is that part's only."""
        try:
            run()
        except Exception as error:
            record["problems"][key] = f"{type(error).__name__}: {error}"
            self.tell(f"  error: {record['problems'][key]}")
        self._write(source, record)

    def _measure(self, opened: Any, record: dict[str, Any]) -> None:
        before = record.pop(PERPLEXITY, None)
        record[PERPLEXITY] = measure_held_out(
            opened,
            self.settings.texts,
            sequence_length=self.settings.sequence_length,
            batch_size=self.settings.batch_size,
            identity={"model": record["model"], "versions": self.results["versions"]},
            before=before,
        )

    def _run(self, model: Any, task: PresetTask, record: dict[str, Any]) -> None:
        identity = self._identity(model, task, record["model"])
        if record["tasks"].get(task.key, {}).get("identity") == identity:
            self.tell("  done by an earlier call")
            return
        record["tasks"].pop(task.key, None)
        data = hashlib.sha256(repr(identity["data"]).encode()).hexdigest()
        group = build_task(self.manager, task, self.settings.data_dir, data)
        result = run_task(
            model,
            self.manager,
            group,
            limit=self.settings.limit,
            run_code=self.settings.run_code,
            chat=self.settings.chat,
        )
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["tasks"][task.key] = {"identity": identity, **result, "finished": finished}
        if result["cut_prompts"]:
            self.tell(
                f"  {result['cut_prompts']} of {result['requests']} prompts are longer than the "
                f"{model.max_length} tokens of --max-length and lost their beginning"
            )

    def _identity(
        self, model: Any, task: PresetTask, description: dict[str, Any]
    ) -> dict[str, Any]:
        """What must agree for a result to be the same."""
        return {
            "task": task.task,
            "shots": task.shots,
            "limit": self.settings.limit,
            "chat": self.settings.chat,
            "data": self._data(task),
            "model": description,
            "max_length": model.max_length,
            "batch_size": self.settings.batch_size,
            "seeds": SEEDS,
            "versions": self.results["versions"],
        }

    def _data(self, task: PresetTask) -> dict[str, str]:
        """sha256 of each local file by its name, or the names of the hub's data sets."""
        files = unique(_files(self.manager, task))
        folder = self.settings.data_dir
        if folder is None:
            return {str(file.below(Path())): "hub" for file in files}
        for path in (file.below(folder) for file in files):
            self.hashes[path] = self.hashes.get(path) or sha256_of(path)
        return {str(file.below(Path())): self.hashes[file.below(folder)] for file in files}
