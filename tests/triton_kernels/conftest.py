"""What every kernel test runs under: a device, TF32 as Composer sets it, and poisoned memory."""

import sys
from pathlib import Path

import pytest
import torch

# Shapes, cases and models are those that the benchmarks time.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import checkout  # noqa: E402

checkout.activate()  # where nothing is installed: in pytest-xdist's processes on a GPU machine

import kernel_cases  # noqa: E402
from machine import tf32_allowed  # noqa: E402

from apex_composer.triton_kernels.availability import interpreted  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    """The GPU where the kernels are compiled, the CPU where they are interpreted."""
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture(autouse=True, scope="module")
def tf32():
    """Allowed, as Composer's DeviceGPU allows it for the whole process: ours must not care."""
    with tf32_allowed():
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Let torch.empty return NaN, so that what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*arguments, **settings) -> torch.Tensor:
        tensor = empty(*arguments, **settings)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def nearest_to_its_bound(record_property):
    """What a benchmark's report says of a test that has passed."""
    kernel_cases.compared.clear()
    yield
    if kernel_cases.compared:
        error, bound = max(kernel_cases.compared, key=lambda pair: pair[0] / pair[1])
        record_property("error", error)
        record_property("bound", bound)
