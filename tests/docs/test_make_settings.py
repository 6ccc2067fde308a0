"""docs/settings.md is what signatures, docstrings and the command line say."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs" / "make_settings.py")
make_settings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_settings)

TITLES = {title for title, _ in make_settings.GROUPS.values()}
CLASSES = {name: thing for title in TITLES for name, _, thing in make_settings.objects(title)}


def test_the_page_is_what_the_code_says():
    assert make_settings.PAGE.read_text() == make_settings.make_page(), (
        "docs/settings.md is not what the code says any more: `make docs`"
    )


def test_every_entry_point_of_llm_foundry_has_a_heading():
    groups = {p.group for p in make_settings.distribution("apex-composer").entry_points}
    transforms = {"llmfoundry_config_transforms", "console_scripts"}
    assert groups - transforms <= set(make_settings.GROUPS)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_setting_is_documented_and_none_that_is_not(name):
    rows = make_settings.settings(CLASSES[name])
    assert [setting for setting, _, meaning in rows if not meaning] == []
    signature = inspect.signature(CLASSES[name]).parameters
    if "given" not in signature:  # those hand the rest on
        assert {setting for setting, _, _ in rows} <= set(signature)


def test_every_option_is_documented():
    lines = make_settings.make_page().partition("## Commands")[2].splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 50 and [row for row in rows if row.endswith("|  |")] == []


def test_arguments_of_a_docstring():
    docstring = "One.\n\nArgs:\n    a: first,\n        and more. Default: 1.\n    b_2: `x: y`.\n"
    docstring += "\nRaises:\n    V: no."
    found = make_settings.arguments(docstring)
    assert found == {"a": "first, and more. Default: 1.", "b_2": "`x: y`."}
    assert make_settings.arguments("One.") == {}


def test_defaults_and_markdown():
    given = [None, True, (1.0, "a"), ROOT / "yamls" / "demo.yaml", inspect.Parameter.empty, ""]
    expected = ["`null`", "`true`", "`[1.0, a]`", "`yamls/demo.yaml`", "", "-"]
    assert [make_settings.shown(value) for value in given] == expected
    assert make_settings.escape("a|b `c*|d` <e>*") == r"a\|b `c*\|d` \<e>\*"


def test_the_width_of_the_terminal_and_the_hash_seed_change_nothing():
    environment = {"COLUMNS": "40", "PYTHONHASHSEED": "7", "TERM": "xterm", "FORCE_COLOR": "1"}
    program = "import make_settings as m; print(''.join(m.commands()), end='')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "docs",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "".join(make_settings.commands())
