import json

from example_report import example_run
from typer.testing import CliRunner

from apex_composer.cli import app
from apex_composer.compare.__main__ import report_runs
from apex_composer.compare.configuration import Run
from apex_composer.report.command import report_job


def write_result(folder, loss):
    """What `make compare` leaves of a run."""
    folder.mkdir(parents=True)
    training = list(example_run("one", batches=20).loss.values)
    kept = {"training_loss": training, "held_out_loss": loss, "step_seconds": [0.1] * 20}
    kept |= {"trained_share": 1.0, "optimizer_bytes": 1, "method_bytes": 0, "device": "cpu"}
    (folder / "result.json").write_text(json.dumps(kept | {"threads": 1, "run_seconds": 1.0}))
    (folder / "config.yaml").write_text(f"run_name: {folder.parent.name}\nseed: 17\n")


def test_the_command_writes_the_page_and_says_the_answer(tmp_path):
    for name, loss in (("full", 2.0), ("lora", 2.1)):
        write_result(tmp_path / name / "seed17", loss)
    out = tmp_path / "deep" / "report.html"
    given = ["report", tmp_path / "full", tmp_path / "lora", "--out", out, "--baseline", "full"]
    result = CliRunner().invoke(app, [*map(str, given), "--title", "A & B"])
    assert result.exit_code == 0, result.output
    assert "lora" in result.output and "report.html" in result.output
    assert "<title>A &amp; B</title>" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_a_baseline_that_is_no_run_is_an_error(tmp_path):
    write_result(tmp_path / "full" / "seed17", 2.0)
    given = ["report", tmp_path, "--out", tmp_path / "report.html", "--baseline", "ful"]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 1 and "error: " in result.output and "ful" in result.output
    assert not (tmp_path / "report.html").exists()


def test_compare_reports_the_runs_that_have_a_result(tmp_path, capsys):
    runs = []
    for name, loss in (("full", 2.0), ("lora", 2.1)):
        folder = tmp_path / "runs" / name / "seed17"
        write_result(folder, loss)
        runs.append(Run(name, 17, folder, {}, ""))
    report_runs(tmp_path, runs)
    assert "lora against full</title>" in (tmp_path / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    (tmp_path / "report.html").unlink()
    report_runs(tmp_path, [])
    assert not (tmp_path / "report.html").exists()


def test_a_job_does_not_fail_with_its_report_and_says_how_to_write_it(tmp_path):
    out = tmp_path / "a report.html"
    out.write_text("of an earlier job")
    told = report_job([tmp_path / "run"], out, ["full"])
    assert told.startswith("No report: FileNotFoundError: ") and str(tmp_path / "run") in told
    given = f"--out '{out}' --baseline full"
    assert told.endswith(f"to write it: apex-composer report {tmp_path / 'run'} {given}")
    assert not out.exists()


def test_a_fault_of_the_report_itself_is_told_too(tmp_path, monkeypatch, capsys):
    from apex_composer.report import page

    def broken(*_, **__):
        raise KeyError("a fault")

    monkeypatch.setattr(page, "write_report", broken)
    report_runs(tmp_path, [Run("full", 17, tmp_path / "runs" / "full" / "seed17", {}, "")])
    assert "No report: KeyError: 'a fault'" in capsys.readouterr().out
