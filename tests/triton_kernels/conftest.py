"""What every kernel test runs under: a device, and memory that is poisoned before it is used."""

import pytest
import torch
from apex_composer.triton_kernels.availability import interpreted


@pytest.fixture
def device() -> torch.device:
    """The GPU where the kernels are compiled, the CPU where they are interpreted."""
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Let torch.empty return NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
