import subprocess

import own_names
import pytest
from corpus import sentences, write_jsonl
from typer.testing import CliRunner

from apex_composer.compare import instructions
from apex_composer.compare.__main__ import app, write_results
from apex_composer.compare.configuration import DEFAULT_YAML
from apex_composer.data_prep.atomic_files import read_json
from apex_composer.demo import __main__ as demo
from apex_composer.demo import run as demo_run
from apex_composer.demo.configuration import load_template

TINY_BASE = [
    "variables.base_batches=3",
    "variables.vocabulary_size=300",
    "variables.model.hidden_size=32",
    "variables.model.intermediate_size=64",
    "variables.model.num_hidden_layers=1",
    "shared.max_seq_len=128",
]


def test_what_has_no_result_is_said_and_left_out(tmp_path, capsys):
    result = {
        "training_loss": [3.0, 2.0],
        "held_out_loss": 2.0,
        "trained_share": 1.0,
        "step_seconds": [0.1, 0.1],
        "optimizer_bytes": 1,
        "method_bytes": 0,
    }
    template = load_template(DEFAULT_YAML, tmp_path)
    results = {name: [] for name in template.methods}
    results |= {"full": [result, result], "lora": [result, None]}
    write_results(tmp_path, template, results, {})
    text = (tmp_path / "table.md").read_text()
    assert "| full |" in text and "| lora |" not in text
    missing = text.split("Without a result for every seed: ")[1]
    assert "lora" in missing and "full_tuned" in missing and "full," not in missing
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 2
    assert (tmp_path / "perplexity.png").stat().st_size > 1000


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Arguments of a small job."""
    start = subprocess.run

    def with_own_names(command, **options):
        return start([command[0], own_names.__file__, demo_run.__file__, *command[3:]], **options)

    monkeypatch.setattr(demo.subprocess, "run", with_own_names)
    monkeypatch.setattr(instructions, "SECTION", 100)
    texts = [sentences(seed, words=2000) for seed in range(20)]
    write_jsonl(tmp_path / "text" / "book" / "x.jsonl", texts)
    overrides = ["shared.max_seq_len=128", "variables.apex.assessment.tokens=1024"]
    return ["--data", tmp_path / "text", "--out", tmp_path / "out", *overrides]


@pytest.mark.long
def test_every_method_has_a_row(given, tmp_path):
    base = [setting for setting in TINY_BASE if "model" not in setting]  # of its real width
    given += [f"variables.demo=[{','.join(base)}]", "variables.batches=34"]
    given += ["variables.selected_share=0.0465"]  # of a model with a smaller vocabulary
    result = CliRunner().invoke(app, [str(argument) for argument in given])
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "out" / "compare" / "table.csv").read_text().splitlines()[1:]
    methods = list(load_template(DEFAULT_YAML, tmp_path).methods)
    assert [row.split(",")[0] for row in rows] == methods


@pytest.mark.long
def test_two_methods_end_with_a_table_and_are_not_run_again(given, tmp_path, monkeypatch):
    given += [f"variables.demo=[{','.join(TINY_BASE)}]", "variables.batches=2"]

    def compare(only):
        return CliRunner().invoke(app, [str(a) for a in (*given, "--only", only)])

    result = compare("full,apex_all")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "compare"
    assert "apex_all against full</title>" in (folder / "report.html").read_text()
    csv = (folder / "table.csv").read_text()
    assert [line.split(",")[0] for line in csv.splitlines()[1:]] == ["full", "apex_all"]
    results = {
        name: read_json(folder / "runs" / name / "seed17" / "result.json")
        for name in ("full", "apex_all")
    }
    assert results["full"]["training_loss"][0] == results["apex_all"]["training_loss"][0]
    assert results["full"]["optimizer_bytes"] > 0 == results["full"]["method_bytes"]
    assert results["apex_all"]["method_bytes"] > 0
    # Again, with one more that cannot be built: the finished ones stay, the base model too.
    monkeypatch.setattr(demo, "start_run", pytest.fail)
    given.append("variables.lora.r=0")
    result = compare("full,apex_all,lora")
    assert result.exit_code == 1 and "error: lora, seed 17 failed with status 1" in result.output
    assert (
        "`r` should be a positive integer"
        in (folder / "runs" / "lora" / "seed17" / "log.txt").read_text()
    )
    assert (folder / "table.csv").read_text() == csv
