"""One table and one file from all parts, and what makes the exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import report
import run_all

ROOT = Path(__file__).parents[2]


def line(part: str, met: bool | None) -> dict:
    return {"part": part, "what": f"{part} of [1, 2]", "found": "1", "target": "2", "met": met}


@pytest.fixture
def parts(monkeypatch, device):
    """What each part's script finds, to be changed by a test; and the launches."""
    lines = {part: [line(part, True)] for part in run_all.BUDGETS}
    status, launches = dict.fromkeys(run_all.BUDGETS, 0), []

    def launch(part, arguments, limit):
        launches.append((part, list(arguments), limit))
        if status[part] in (0, 1):
            path = Path(arguments[arguments.index("--json") + 1])
            content = {"part": part, "complete": True, "facts": {}, "lines": lines[part]}
            path.write_text(json.dumps(content))
        return status[part], "Traceback\nRuntimeError: no memory\n"

    monkeypatch.setattr(run_all, "launch", launch)
    return lines, status, launches


@pytest.fixture
def run(tmp_path, device, parts):
    def run(*arguments: str) -> tuple[int, dict]:
        path = tmp_path / "results.json"
        status = run_all.main(["--device", str(device), "--out", str(path), *arguments])
        return status, json.loads(path.read_text())

    return run


def test_parts_run_in_order_and_within_25_minutes(run, parts, capsys):
    status, content = run("--small", "--step=--layers 1")
    assert status == 0
    _, _, launches = parts
    assert [part for part, _, _ in launches] == ["correctness", "bandwidth", "training_step"]
    assert sum(limit for _, _, limit in launches) < 25 * 60
    assert ["--small" in arguments for _, arguments, _ in launches] == [False, True, False]
    assert launches[2][1][-2:] == ["--layers", "1"]
    assert launches[2][1][launches[2][1].index("--profile") + 1] == "missed"
    machine = content["machine"]
    assert {"date", "device", "driver", "versions", "commit", "compiled"} <= set(machine)
    assert {"torch", "triton", "transformers"} <= set(machine["versions"])
    assert set(content["parts"]) == set(run_all.BUDGETS)
    printed = capsys.readouterr().out
    assert printed.count("┏") == 1 and "training_step of [1, 2]" in printed
    assert ("the times mean nothing" in printed) is not machine["compiled"]


def test_wrong_kernels_fail_and_missed_targets_do_not(run, parts):
    lines, status, _ = parts
    lines["bandwidth"] = [line("bandwidth", False)]
    assert run()[0] == 0
    assert run("--strict")[0] == 1
    lines["bandwidth"] = []
    lines["correctness"] = [line("correctness", False)]
    status["correctness"] = 1
    result, content = run()
    assert result == 1 and "error" not in content["parts"]["correctness"]


def test_the_table_counts_the_tests_that_pass(run, parts, capsys):
    lines, status, _ = parts
    lines["correctness"] = [line("right", True), line("wrong", False), line("right", True)]
    status["correctness"] = 1
    _, content = run("--parts", "correctness")
    assert len(content["parts"]["correctness"]["lines"]) == 3
    printed = capsys.readouterr().out
    assert "wrong of [1, 2]" in printed and "right of [1, 2]" not in printed
    assert "2 tests of kernels" in printed


def test_a_part_that_breaks_down_fails_and_the_others_run(run, parts, capsys):
    _, status, launches = parts
    status["bandwidth"] = 124
    result, content = run()
    assert result == 1 and len(launches) == 3
    assert content["parts"]["bandwidth"]["error"] == "RuntimeError: no memory"
    assert not content["parts"]["bandwidth"]["complete"]
    printed = capsys.readouterr()
    assert "broke down with exit status 124" in printed.out
    assert "Traceback" in printed.err


def test_parts_are_added_to_a_file_of_the_same_commit(run, parts):
    lines, _, launches = parts
    run("--parts", "training_step", "correctness", "--commit", "a")
    assert [part for part, _, _ in launches] == ["correctness", "training_step"]
    lines["correctness"] = []
    _, content = run("--parts", "bandwidth", "--commit", "a")
    assert list(content["parts"]) == list(run_all.BUDGETS)
    assert content["parts"]["correctness"]["lines"]
    _, content = run("--parts", "bandwidth", "--commit", "b")
    assert list(content["parts"]) == ["bandwidth"]


def test_without_pytest_nothing_is_begun(run, parts, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install pytest .*--parts bandwidth training_step"):
        run()
    assert not parts[2]


def test_a_part_is_ended_when_its_time_is_over():
    assert run_all.launch("correctness", ["--help"], 0.01) == (124, "")


def test_results_are_named_after_date_and_device():
    path = run_all.default_path({"device": "NVIDIA H200 (141 GB)"})
    assert path.parent == ROOT / "benchmarks" / "results"
    assert path.name.endswith("-nvidia-h200-141-gb.json")


def test_the_table_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.print_table([line("bandwidth", False)], "title")
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "bandwidth", "bandwidth", "of", "[1,", "2]", "1", "2", "NO",
    ]  # fmt: skip


def test_a_plain_checkout_is_importable(tmp_path):
    ignored = shutil.ignore_patterns("triton_kernels", "data_prep", "yamls", "__pycache__")
    shutil.copytree(ROOT / "apex_composer", tmp_path / "apex_composer", ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels")
    scripts = tmp_path / "benchmarks" / "gpu"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu" / "checkout.py", scripts)
    program = (
        "import checkout; checkout.activate(); from apex_composer import triton_kernels; "
        "print(triton_kernels.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=scripts, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(tmp_path / "triton_kernels" / "__init__.py")


def test_another_copy_of_the_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(run_all.checkout, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="results would be those of other code"):
        run_all.checkout.activate()
