"""What is installed, on environments and GPUs made up for the test."""

from importlib.metadata import version

import pytest
import torch

from apex_composer import extras
from apex_composer.tools import install_checks
from apex_composer.tools.install_checks import check_extras, check_torch_build, check_versions


def versions() -> tuple[str, str]:
    (finding,) = check_versions()
    return finding.status, finding.text


def test_versions(monkeypatch):
    assert versions()[0] == "ok"
    wanted = ["torch<1", "none-such>=2", "numpy==0.1; python_version < '3'", "x; extra == 'dev'"]
    monkeypatch.setattr(install_checks, "requires", lambda package: wanted)
    status, text = versions()
    assert status == "warning" and f"torch {version('torch').split('+')[0]}, needed <1" in text
    assert "none-such missing, needed >=2" in text and "numpy" not in text and "x " not in text


@pytest.mark.parametrize("package", ["triton", "tokenizers", "mosaicml", "torch", "llm-foundry"])
def test_an_unfit_version_of_what_computes_is_found(monkeypatch, package):
    installed = install_checks.installed_version
    monkeypatch.setattr(
        install_checks, "installed_version", lambda n: "0.0.1" if n == package else installed(n)
    )
    torch_asks = ["triton==3.3.0"]  # that of a CPU leaves it out
    real = install_checks.requires
    monkeypatch.setattr(
        install_checks, "requires", lambda n: torch_asks if n == "torch" else real(n)
    )
    status, text = versions()
    assert status == "warning" and f"{package} 0.0.1, needed" in text


def test_what_an_absent_extra_asks_for_is_not_needed(monkeypatch):
    asked = {"apex-composer": ["torch>=2", "setuptools<1; extra == 'foundry'"], "torch": None}
    monkeypatch.setattr(install_checks, "requires", asked.get)
    monkeypatch.setattr(
        install_checks,
        "installed_version",
        lambda n: "80.0" if n in (*asked, "setuptools") else None,
    )
    assert versions() == (
        "warning",
        "setuptools 80.0, needed <1. Install with `make install`, or pip -c constraints.txt",
    )
    monkeypatch.setattr(install_checks, "missing_packages", lambda extra: ["composer"])
    assert versions() == ("ok", "torch 80.0 and others, as apex-composer, torch need them")


def test_each_extra_is_a_line(monkeypatch):
    absent = {"flash_attn", "streaming", "pyarrow", "yaml"}
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda n: None if n in absent else find(n))
    found = {finding.check: (finding.status, finding.text) for finding in check_extras()}
    extra = ("foundry", "prep", "remote", "ray", "gpu", "optimizers", "eval")
    assert [*found] == [f"extra: {name}" for name in extra]
    assert found["extra: foundry"][0] == "ok" and "llmfoundry" in found["extra: foundry"][1]
    assert found["extra: prep"] == (
        "absent",
        "without pyarrow, yaml: pip install 'apex-composer[prep]'",
    )
    assert "apex-composer[gpu]' (Python 3.10" in found["extra: gpu"][1]


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs of these capabilities, and torch built for these architectures."""

    def install(capabilities, architectures, cuda="12.6"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capabilities[n])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return list(check_torch_build())

    return install


def test_a_build_without_code_for_a_gpu_is_a_failure(gpus):
    ampere, blackwell = gpus([(8, 0), (12, 0), (8, 0)], ["sm_80", "sm_90"])
    assert ampere.status == "ok" and ampere.text.startswith("2 x GPU, capability 8.0: ")
    assert blackwell.status == "failure"
    assert "1 x GPU, capability 12.0: " in blackwell.text and "only sm_80 sm_90; " in blackwell.text
    assert "cu128" in blackwell.text


def test_ptx_will_do(gpus):
    (finding,) = gpus([(9, 0)], ["sm_80", "compute_80"])
    assert finding.status == "ok" and "compiles at the first start" in finding.text


def test_a_build_that_does_not_say_is_not_blamed(gpus):
    assert gpus([(9, 0)], []) == []


def test_without_cuda_there_is_nothing_to_compare(gpus, monkeypatch):
    assert gpus([(9, 4)], ["gfx942"], cuda=None) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(check_torch_build()) == []
