"""The one command line of the package: all commands, their exit statuses, nothing heavy to load."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from apex_composer.cli import app

COMMANDS = (
    *("demo", "compare", "prep", "prep-merge", "prep-verify"),
    *("plan", "doctor", "show", "branch", "merge", "eval", "observe", "report"),
)


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from apex_composer.cli import app; "
        "call = lambda *name: app([*name, '--help'], prog_name='root', standalone_mode=False); "
        f"call(); [call(name) for name in {COMMANDS}]; "
        "heavy = {'torch', 'composer', 'llmfoundry', 'transformers', 'streaming'}; "
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for name in COMMANDS:
        assert f"│ {name} " in result.stdout and f"Usage: root {name} " in result.stdout
    assert "imported: []" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ([], 2, "Commands"),
        (["docto"], 2, "Did you mean 'doctor'?"),
        (["show"], 2, "Missing argument"),
        (["show", "none.pt"], 1, "error: none.pt does not exist"),
        (["merge", "none.pt", "--out", "out"], 1, "error: none.pt does not exist"),
        (["merge", "--out", "out"], 2, "Missing argument"),
        (["merge", "none.pt", "--out", "out", "--dtype", "int8"], 2, "'int8' is not one of"),
        (
            ["observe", "none", "--out", "out"],
            1,
            "error: nothing to observe: give --data, --ranks or --delta",
        ),
        (["prep", "none", "--out", "out", "--tokenizer", "none"], 2, "error: "),
        (["prep-verify", "none"], 2, "error: "),
        (["report"], 2, "Missing argument"),
        (["report", "none"], 1, "error: "),
        (["demo", "--yaml", "none.yaml"], 1, "error: "),
        (["compare", "--only", "ful"], 1, "Did you mean 'full'?"),
    ],
)
def test_exit_status(tmp_path, monkeypatch, arguments, status, told):
    """2 where the command line is at fault, 1 for what it names."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status and told in result.output, result.output
