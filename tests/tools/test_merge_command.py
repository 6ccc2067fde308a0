"""`apex-composer merge`: what it says, and its exit status."""

from pathlib import Path

import pytest
from saved_runs import base_folder, load, noisy, save, tokenizer_of, wrapped
from typer.testing import CliRunner

from apex_composer.cli import app


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    base = base_folder(tmp_path / "base")
    return [
        save(wrapped(noisy(load(base), n), tokenizer_of(base)), tmp_path / f"{n}.pt", batch=n)
        for n in range(2)
    ]


def invoke(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_a_mean_and_a_conversion(paths, tmp_path):
    status, text = invoke(*paths, "--out", tmp_path / "a", "--base", tmp_path / "base")
    assert status == 0 and f"{tmp_path}/a: the mean of 2 checkpoints, for Auto" in text
    assert "note:" not in text and "merging: 100%" in text
    status, text = invoke(paths[0], "--out", tmp_path / "b", "--dtype", "bfloat16")
    assert status == 0 and f"{tmp_path}/b: 1 checkpoint, for" in text and "note: generation" in text
    assert str(load(tmp_path / "b").dtype) == "torch.bfloat16"


def test_what_is_refused_is_one_line(paths, tmp_path):
    status, text = invoke(paths[0], paths[0], "--out", tmp_path / "a")
    assert status == 1 and text.startswith("error: ") and "are the same checkpoint" in text
    assert invoke(*paths, "--out", tmp_path / "base")[1].endswith("another --out, or --overwrite")
    assert invoke(*paths, "--out", tmp_path / "base", "--overwrite")[0] == 0
