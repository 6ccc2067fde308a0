"""Every test is a line of the report, with what went wrong, and the suite has the real shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import correctness
import machine
import pytest
from monarch_case import LLAMA_2_7B, TINYLLAMA

TESTS = """
import pytest

def test_right(record_property):
    record_property("error", 1e-7)
    record_property("bound", 5e-7)

@pytest.fixture
def broken():
    raise ValueError("an illegal memory access")

def test_wrong():
    error = 2e-6
    assert error <= 1e-6

def test_without_a_device(broken):
    pass
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the script on some tests: its exit status, and the report's content."""
    monkeypatch.setattr(correctness, "choose_device", lambda wanted: None)

    def check(text: str, *arguments: str) -> tuple[int, dict]:
        path = tmp_path / f"test_{len(text)}.py"  # a module for each text
        path.write_text(text)
        monkeypatch.setattr(correctness, "TESTS", [path])
        found = tmp_path / "found.json"
        status = correctness.main(["--json", str(found), *arguments])
        return status, json.loads(found.read_text())

    return check


def test_every_test_is_a_line(check, capsys):
    status, content = check(TESTS)
    assert status == 1 and content["complete"]
    right, wrong, without = content["lines"]
    assert right["what"] == "::test_right" and right["met"] is True
    assert right["error"] == 1e-7 and "error 1.0e-07 (at most 5.0e-07)" in right["found"]
    assert wrong["met"] is False and wrong["found"] == "assert 2e-06 <= 1e-06"
    assert without["met"] is False and "ValueError: an illegal memory access" in without["found"]
    assert "::test_right" in capsys.readouterr().out


def test_only_what_has_passed_is_right(check):
    assert check(TESTS, "-k", "right")[0] == 0
    status, content = check(TESTS, "-k", "right", "--budget", "-1")
    assert status == 1 and "not run: no time was left" in content["lines"][0]["found"]
    status, content = check("import nothing_of_that_name", "-k", "right")
    assert status == 1 and not content["complete"]
    assert "No module named 'nothing_of_that_name'" in content["lines"][0]["found"]
    assert check(TESTS, "-k", "nothing")[0] == 1


def test_every_shape_of_the_real_models_is_tested():
    shapes = {(shape.n, shape.axis) for shape in TINYLLAMA + LLAMA_2_7B}
    assert shapes == {(64, 0), *((n, axis) for n in (704, 256, 1376, 512) for axis in (0, 1))}
    assert all(path.exists() for path in correctness.TESTS)


def test_a_machine_without_pytest_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="need pytest: pip install pytest"):
        correctness.main([])


def test_a_machine_with_torch_triton_and_transformers_alone_runs_the_tests(tmp_path):
    """As a plain checkout: where the project is not installed, nor a trainer."""
    missing = ("composer", "llmfoundry", "streaming", "omegaconf", "typer")
    arguments = ["--device", "cpu", "--json", str(tmp_path / "found.json"), "-k", "are_counted"]
    program = f"""if True:
        import sys
        class Missing:
            def find_spec(name, *_):
                if name.partition(".")[0] in {missing}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Missing)
        import correctness
        sys.exit(correctness.main({arguments}))"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    folder = Path(correctness.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert [line["met"] for line in lines] == [True]
