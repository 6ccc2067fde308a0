"""What is said where an extra is not installed, and what is not said where it is broken."""

import subprocess
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest
from core_alone import FIND, finder_without

from apex_composer import extras
from apex_composer.extras import EXTRAS, MissingExtraError, installation, needing, require

FOUNDRY = "pip install 'apex-composer\\[foundry\\]' \\(Python 3.10 to 3.12"
# Every public class of the rooms that know Composer, by the module that a user would import.
CLASSES = {
    "trainer.algorithm": "APEX",
    "trainer.scheduler": "StagewiseScheduler",
    "callbacks.preemption": "Preemption",
    "callbacks.start_guard": "StartGuard",
    "callbacks.heartbeat": "Heartbeat",
    "callbacks.fused_swiglu": "FusedSwiGLUCallback",
    "callbacks.prepared_data": "PreparedData",
}


@pytest.fixture
def without(monkeypatch):
    """Make packages as absent as if they were not installed."""

    def hide(*packages):
        for name in [*sys.modules]:
            if name.split(".")[0] in packages:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(PathFinder, "find_spec", finder_without(packages))

    return hide


def test_what_is_there_is_not_refused():
    require("This", "foundry")
    require("This", "prep")
    assert extras.missing_packages("remote") == []


def test_a_missing_extra_is_refused_before_anything_begins(without):
    without("pyarrow", "joblib")
    told = r"^This needs pyarrow, joblib, which are not installed: pip install '.*\[prep\]'$"
    with pytest.raises(MissingExtraError, match=told):
        require("This", "prep")


@pytest.mark.parametrize(
    ("version", "told"),
    [((3, 12), "(Python 3.10 to 3.12)"), ((3, 13), "(Python 3.10 to 3.12; this is 3.13)")],
)
def test_the_command_names_the_pythons_of_llm_foundry(monkeypatch, version, told):
    monkeypatch.setattr(sys, "version_info", version)
    assert installation("foundry") == f"pip install 'apex-composer[foundry]' {told}"
    assert installation("prep") == "pip install 'apex-composer[prep]'"


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_package_leads_to_its_extra(without, extra):
    for package in EXTRAS[extra]:
        without(package)
        with pytest.raises(MissingExtraError, match=rf"This needs {package}, .*\[{extra}\]"):
            with needing("This"):
                import_module(package)


def test_the_error_of_a_broken_package_is_its_own(without, tmp_path, monkeypatch):
    without()
    (tmp_path / "streaming").mkdir()
    broken = tmp_path / "streaming" / "__init__.py"
    monkeypatch.syspath_prepend(tmp_path)
    for line, told in [
        ("import not_there_either", "No module named 'not_there_either'"),
        ("from os import no_such_name", "no_such_name"),
        ("import streaming.gone", "No module named 'streaming.gone'"),
    ]:
        broken.write_text(line)
        monkeypatch.delitem(sys.modules, "streaming", raising=False)
        with pytest.raises(ImportError, match=told) as caught, needing("This"):
            import_module("streaming")
        assert not isinstance(caught.value, MissingExtraError)


def test_a_folder_of_the_same_name_is_no_package(without, tmp_path, monkeypatch):
    """A clone of a repository beside one's script, say: Python takes it for a namespace."""
    (tmp_path / "streaming" / "tests").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    without("streaming")
    monkeypatch.setattr(PathFinder, "find_spec", lambda *args: FIND(args[0], [str(tmp_path)]))
    for _ in ("first", "imported"):
        with pytest.raises(MissingExtraError, match="^This needs streaming, which is not"):
            require("This", "remote")
        with pytest.raises(MissingExtraError, match="^That needs streaming, which is not"):
            with needing("That"):
                import_module("streaming.base")


def test_a_module_made_by_hand_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert extras.missing_packages("gpu") == ["flash_attn"]


@pytest.mark.parametrize(("module", "name"), CLASSES.items())
def test_a_class_for_composer_says_what_it_needs(without, monkeypatch, module, name):
    without("composer")
    monkeypatch.delitem(sys.modules, f"apex_composer.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=f"^{name} needs composer, .*{FOUNDRY}"):
        import_module(f"apex_composer.{module}")


@pytest.mark.parametrize("name", ["APEX", "StagewiseScheduler"])
def test_so_does_a_public_name(without, monkeypatch, name):
    without("composer")
    for module in ("algorithm", "scheduler"):
        monkeypatch.delitem(sys.modules, f"apex_composer.trainer.{module}", raising=False)
    with pytest.raises(ImportError, match=f"^{name} needs composer, .*{FOUNDRY}"):
        exec(f"from apex_composer import {name}")


COMMANDS = {
    "--help": "0 Usage: ",
    "doctor": "0 ",
    "show tests/before_rooms/ep0-ba5-rank0.pt": "0 ",
    "prep-verify tests/before_rooms/prepared --workers 1": "0 ",
    "plan yamls/demo.yaml": "2 error: apex-composer plan needs omegaconf, ",
    "doctor yamls/demo.yaml": "2 error: apex-composer doctor with a YAML needs omegaconf, ",
    "show yamls/demo.yaml": "2 error: apex-composer show with a YAML needs omegaconf, ",
    "branch tests/before_rooms/ep0-ba5-rank0.pt --yaml a --out b": (
        "2 error: apex-composer branch needs omegaconf, "
    ),
    "demo": "2 error: apex-composer demo needs composer, llmfoundry, ",
    "prep a --out b --tokenizer c": "2 error: Data preparation needs pyarrow, ",
    "prep a --out b --tokenizer c --upload s3://a/b": (
        "2 error: upload='s3://a/b' needs streaming, which is not installed: "
        "pip install 'apex-composer[remote]'"
    ),
    "prep-merge a": "2 error: Data preparation needs pyarrow, ",
    "prep-verify tests/before_rooms/prepared": "2 error: Counting cores ",
}


def test_the_core_alone_runs_what_needs_no_extra_and_tells_the_rest():
    done = subprocess.run(
        [sys.executable, "tests/core_alone.py"],
        input="\n".join(COMMANDS),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    for line, told in zip(done.stdout.splitlines(), COMMANDS.values(), strict=True):
        assert line.startswith(told)
