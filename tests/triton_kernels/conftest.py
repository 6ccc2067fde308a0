"""What every kernel test runs under: a device, and memory that is poisoned before it is used."""

import pytest
import torch

from apex_composer.triton_kernels.availability import interpreted


@pytest.fixture
def device() -> torch.device:
    """The GPU where the kernels are compiled, the CPU where they are interpreted."""
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Let torch.empty return NaN, so that what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*arguments, **settings) -> torch.Tensor:
        tensor = empty(*arguments, **settings)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
