"""Every capability below the machine's is run, and takes effect."""

import os
from types import SimpleNamespace

import lower_capabilities
import pytest
import torch

NAMES = {"default": ("DEFAULT", "NO AVX"), "avx2": ("AVX2",), "avx512": ("AVX512",)}


@pytest.mark.numeric
def test_the_capability_that_is_asked_for_is_in_effect():
    asked, found = os.environ.get("ATEN_CPU_CAPABILITY"), torch.backends.cpu.get_cpu_capability()
    assert asked is None or found in NAMES[asked]


@pytest.mark.parametrize(
    ("best", "expected"),
    [("AVX512", ["avx2", "default"]), ("AVX2", ["default"]), ("DEFAULT", [])],
)
@pytest.mark.parametrize("failing", [None, "avx2", "default"])
def test_every_lower_capability_is_run_and_any_failure_counts(
    monkeypatch, capsys, best, expected, failing
):
    started = []

    def run(command, env):
        started.append(env["ATEN_CPU_CAPABILITY"])
        assert command[-3:] == ["-m", "numeric", "-x"]
        return SimpleNamespace(returncode=int(started[-1] == failing))

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: best)
    monkeypatch.setattr(lower_capabilities.subprocess, "run", run)
    assert lower_capabilities.main("-x") == int(failing in expected)
    assert started == expected
    assert capsys.readouterr().out.count("Numeric tests with") == len(expected)
