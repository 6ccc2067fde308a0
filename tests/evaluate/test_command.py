import json
import re
import sys
from io import StringIO
from pathlib import Path

import datasets
import pytest
import torch
from documents import document
from typer.testing import CliRunner

from apex_composer.cli import app
from apex_composer.evaluate import harness, models
from apex_composer.evaluate.preset import read_preset

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def call(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.fixture
def nothing_opens(monkeypatch):
    monkeypatch.setattr(models, "open_model", lambda *_, **__: pytest.fail("a model was opened"))


def test_a_model_is_evaluated_and_the_call_goes_on(
    tmp_path, preset, data_dir, model_folder, short_answers
):
    arguments = [model_folder, "--preset", preset, "--data-dir", data_dir, "--out", tmp_path]
    arguments += ["--skip", "humaneval_pass_at_10,tydiqa", "--only", "sciq,nq_open"]
    status, output = call(*arguments, "--device", "cpu")
    assert status == 0, output
    assert "task-shots" in output and "done by an earlier call" not in output
    page = (tmp_path / "eval.md").read_text()
    assert page.startswith(f"# Small\n\n| task-shots | metric | {model_folder.name} |\n")
    assert "\n\n| model | PPL | SciQ 2-shot | NQ 1-shot | average |\n" in page
    assert "| paper | 5.5 | 88.0 | – | – |" in page
    result = json.loads((tmp_path / "eval.json").read_text())
    metrics = result["models"][str(model_folder)]["tasks"]["sciq-2"]["metrics"]
    assert f"| sciq-2 | acc | {100 * metrics['acc,none']['value']:.1f} ± " in page
    status, output = call(*arguments, "--device", "cpu", tmp_path / "none")
    assert status == 1 and output.count("done by an earlier call") == 2
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert f"error: {tmp_path / 'none'}: " in output


def test_missing_files_are_all_named_before_a_model_is_loaded(
    tmp_path, preset, model_folder, nothing_opens
):
    status, output = call(model_folder, "--preset", preset, "--data-dir", tmp_path)
    assert status == 1 and output.count(".jsonl: missing. Write it from split") == 7
    assert "humaneval_pass_at_10-0: it runs Python programs that the model writes" in output
    assert "--skip leaves tasks out; --list-files says which files are needed" in output
    assert not (tmp_path / "eval.json").exists()


def test_a_model_that_does_not_fit_leaves_the_others(
    tmp_path, preset, data_dir, model_folder, monkeypatch
):
    opens = models.open_model

    def fill(source, **options):
        if source == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return opens(source, **options)

    monkeypatch.setattr(models, "open_model", fill)
    arguments = ["--preset", preset, "--data-dir", data_dir, "--out", tmp_path, "--only", "sciq"]
    status, output = call("large", model_folder, *arguments)
    assert status == 1 and "error: large: CUDA out of memory" in output
    assert [*json.loads((tmp_path / "eval.json").read_text())["models"]] == [str(model_folder)]
    assert "sciq-2" in (tmp_path / "eval.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to evaluate: name a model"),
        (["m", "--only", "sciq", "--skip", "sciq"], "nothing to evaluate"),
        (["m", "--skip", "siq"], "siq: no task of preset cpt. Did you mean 'sciq'?"),
        (["m", "--preset", "cppt"], "--preset cppt: there is none"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_told(arguments, told, nothing_opens):
    status, output = call(*arguments)
    assert status == 1 and told in output


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, output = call("m")
    assert status == 2
    assert "apex-composer eval needs lm_eval, which is not installed: pip install 'apex" in output


def test_files_are_listed_and_the_pages_program_writes_them(tmp_path, monkeypatch):
    status, listed = call("--list-files", "--preset", "cpt", "--only", "sciq,boolq,winogrande")
    assert status == 0 and len(listed.splitlines()) == 4

    def load(name, configuration, split):
        assert configuration in (None, "boolq", "winogrande_xl")
        rows = [document(name, number) for number in range(40)]
        return datasets.Dataset.from_list(rows)

    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sys, "stdin", StringIO(listed))
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "program", "exec"), {})
    tasks = [
        task for task in read_preset("cpt").tasks if task.task in ("sciq", "boolq", "winogrande")
    ]
    manager = harness.find_tasks(tasks)
    for task in tasks:
        for file in harness.wanted_files(manager, task)[task.task].values():
            assert file.problem(tmp_path / "eval-data") is None
