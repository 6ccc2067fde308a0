import re
import subprocess
import sys
from pathlib import Path

import own_names
import pytest
from corpus import sentences, write_corpus, write_jsonl
from results_fixture import example_metrics, example_summary
from typer.testing import CliRunner

from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.demo import __main__ as demo
from apex_composer.demo import from_scratch
from apex_composer.demo import run as demo_run
from apex_composer.demo.configuration import DEFAULT_YAML, load_template


def test_a_failed_run_is_named_with_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"run 'apex' failed with status 1(.|\n)*config\.yaml"):
        demo.start_run("apex", tmp_path, {"max_duration": "1ba"})
    assert (tmp_path / "apex" / "config.yaml").read_text() == "max_duration: 1ba\n"


def test_a_run_gets_no_hub_and_keeps_the_users_own_settings(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    environment = demo.run_environment()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_errors_are_one_line_and_a_status():
    result = CliRunner().invoke(demo.app, ["--data", "absent", "--out", "absent-too"])
    assert result.exit_code == 1
    assert "error: input='absent' is not a folder" in result.output.replace("\n", " ")
    assert result.output.lstrip().startswith("1. data")  # what will happen comes before all else
    assert not Path("absent-too").exists()


def test_prepared_data_is_used_again(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", documents=60)
    overrides = ["variables.vocabulary_size=320", "shared.max_seq_len=32"]
    template = load_template(DEFAULT_YAML, tmp_path / "out", overrides)
    first = demo.prepare_data(corpus, tmp_path / "out", template)
    monkeypatch.setattr(from_scratch, "write_text_and_tokenizer", pytest.fail)
    assert demo.prepare_data(corpus, tmp_path / "out", template) == first


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_job_ends_with_its_report_or_says_why_there_is_none(tmp_path, monkeypatch, is_whole):
    def run_job(data, out, yaml, overrides):
        for name, offset in (("vanilla", 0.0), ("apex", -0.1)) if is_whole else ():
            write_json(out / name / "metrics.json", example_metrics(offset, 1.0) | {"stages": []})
        return example_summary()

    monkeypatch.setattr(demo, "run_job", run_job)
    result = CliRunner().invoke(demo.app, ["--out", str(tmp_path)])
    assert result.exit_code == 0 and "summary.json" in result.output, result.output
    assert (tmp_path / "report.html").exists() is is_whole
    if is_whole:
        assert f"{tmp_path}/report.html   all of it" in result.output
        assert "apex against vanilla</title>" in (tmp_path / "report.html").read_text()
    else:
        assert "No report: FileNotFoundError" in result.output
        assert f"apex-composer report {tmp_path}/vanilla {tmp_path}/apex --out" in result.output


TINY = [
    "variables.base_batches=3",
    "variables.batches=3",
    "variables.vocabulary_size=300",
    "variables.model.hidden_size=32",
    "variables.model.intermediate_size=64",
    "variables.model.num_hidden_layers=1",
    "shared.max_seq_len=32",
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("documents", "lines"),
    [
        ({"book": 1}, ["sections of the same documents"]),
        ({"book": 1, "arxiv": 2}, ["book .* training only"]),
    ],
)
def test_few_long_documents_end_with_results(tmp_path, monkeypatch, documents, lines):
    start = subprocess.run

    def with_own_names(command, **options):
        return start([command[0], own_names.__file__, demo_run.__file__, *command[3:]], **options)

    monkeypatch.setattr(demo.subprocess, "run", with_own_names)
    for number, (domain, count) in enumerate(documents.items()):
        texts = [sentences(10 * number + seed, words=6000) for seed in range(count)]
        write_jsonl(tmp_path / "text" / domain / "x.jsonl", texts)
    arguments = ["--data", tmp_path / "text", "--out", tmp_path / "out", *TINY]
    result = CliRunner().invoke(demo.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    for line in (*lines, "total"):
        assert re.search(line, " ".join(result.output.split()))
    assert read_json(tmp_path / "out" / "summary.json")["apex_ppl"]["total"] > 1
    assert "apex against vanilla</title>" in (tmp_path / "out" / "report.html").read_text()
