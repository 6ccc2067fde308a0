"""The scripts of benchmarks/ import each other by name, as they do when they are started."""

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path += [str(SCRIPTS), str(SCRIPTS.parent)]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels are interpreted: these tests are of the scripts, not of a GPU."""
    from apex_composer.triton_kernels.availability import interpreted

    return torch.device("cpu" if interpreted() else "cuda")
