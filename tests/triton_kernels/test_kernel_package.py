"""What surrounds the kernels: imports, availability, and what a batch refuses."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from kernel_cases import small_case

from apex_composer import triton_kernels
from apex_composer.triton_kernels import (
    availability,
    monarch_unavailable_reason,
    unavailable_reason,
)

SOURCES = sorted((Path(__file__).parents[2] / "triton_kernels").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    nodes = ast.walk(ast.parse(path.read_text()))
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    outside = {
        name.split(".")[0] for name in imported if not name.startswith(triton_kernels.__name__)
    }
    assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}


def run(program: str, **environment: str) -> str:
    """What a fresh process prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_asking_for_a_reason_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import importlib.util as util; "
        "found = util.find_spec; "
        "util.find_spec = lambda name: None if name == 'triton' else found(name); "
        "from apex_composer.triton_kernels import unavailable_reason; "
        "print(unavailable_reason('cpu'))"
    )
    assert "triton is not installed" in run(program)


def test_kernels_that_cannot_run_raise_with_the_reason():
    program = (
        "import torch; from apex_composer.triton_kernels import *\n"
        "print(unavailable_reason('cpu'))\n"
        "try: unit_square_sums(torch.ones(2, 3, 4), 1)\n"
        "except RuntimeError as error: print(error)"
    )
    reason, error = run(program).splitlines()
    assert "start the process with TRITON_INTERPRET=1" in reason and error == reason
    if availability.interpreted():
        assert unavailable_reason("cpu") is None


def test_reasons_name_what_is_missing(monkeypatch):
    assert "not meta" in unavailable_reason("meta")
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is False" in unavailable_reason("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5, the kernels need 8.0" in unavailable_reason("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable_reason("cuda") is None


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to have a GPU of a capability and shared memory, and a version of triton."""

    def pretend(capability: tuple[int, int], shared: int, version: str = "3.3.0") -> None:
        properties = SimpleNamespace(shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.version, "cuda", "12.6")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(triton, "__version__", version)

    return pretend


def test_blocks_are_refused_by_their_shape_and_by_the_devices_shared_memory(gpu):
    gpu((8, 6), 101_376)
    assert monarch_unavailable_reason("cuda", 64, 128) is None
    told = "the kernels take blocks of up to 128, not 55 x 155"
    assert monarch_unavailable_reason("cuda", 55, 155) == told
    gpu((8, 0), 65_536)
    assert monarch_unavailable_reason("cuda", 64, 64) is None
    told = "blocks of 64 x 128 need 67,584 bytes of shared memory, cuda has 65,536"
    assert monarch_unavailable_reason("cuda", 64, 128) == told
    gpu((7, 5), 65_536)
    assert "compute capability 7.5" in monarch_unavailable_reason("cuda", 2, 2)


@pytest.mark.parametrize(("version", "runs"), [("3.3.0+git1", False), ("3.3.1", True)])
def test_the_newest_generation_has_no_products_with_an_old_triton(version, runs, gpu):
    gpu((12, 0), 101_376, version)
    assert unavailable_reason("cuda") is None  # norms and SwiGLU
    reason = monarch_unavailable_reason("cuda", 22, 32)
    assert (reason is None) == runs
    if not runs:
        assert reason.startswith(
            "triton 3.3.0 compiles no products for the compute capability 12.0"
        )
    gpu((10, 0), 232_448, version)
    assert monarch_unavailable_reason("cuda", 22, 32) is None


def replaced(name: str, place: int, tensor) -> dict:
    return {"name": name, "place": place, "tensor": tensor}


REFUSED = {
    "half": (
        replaced("weights", 1, lambda t: t.half()),
        r"weights\[1\] is torch.float16, the kernels take torch.float32",
    ),
    "shape": (
        replaced("weights", 1, lambda t: t[:-1]),
        r"weights\[1\] has shape \(14, 8\), weights\[0\] has \(15, 8\)",
    ),
    "stride": (
        replaced("weights", 1, lambda t: t.t().contiguous().t()),
        r"weights\[1\] has stride \(1, 15\), weights\[0\] has \(8, 1\)",
    ),
    "sparse rows and columns": (
        replaced("weights", slice(None), lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        r"strides \(16, 2\), allowed: rows or columns that are contiguous",
    ),
    "too few rows": (
        replaced("weights", slice(None), lambda t: t[:11]),
        r"\(11, 8\) cannot have 6 advantageous and 6 disadvantageous indices along axis 0",
    ),
    "one dimension": (
        replaced("weights", slice(None), lambda t: t.flatten()),
        r"shape \(120,\), allowed: \[rows, columns\]",
    ),
    "int32 indices": (
        replaced("advantageous", 0, lambda t: t.int()),
        r"advantageous\[0\] is torch.int32, the kernels take torch.int64",
    ),
    "index count": (
        replaced("disadvantageous", slice(None), lambda t: t[:5]),
        r"disadvantageous of shape \(5,\), the factors are for \[6\] indices",
    ),
    "contiguity": (
        replaced("lefts", slice(None), lambda t: t.mT),
        r"lefts\[0\] is not contiguous",
    ),
    "factors": (
        replaced("rights", slice(None), lambda t: t[:, :2, :2].contiguous()),
        r"\(\(3, 2, 2\), \(2, 2, 2\)\), allowed: L \[q, p, p\] and R \[p, q, q\]",
    ),
    "counts": (replaced("lefts", slice(1, 2), None), "one of each per matrix.*'lefts': 1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_batch_refuses_what_does_not_fit(change, message, device):
    case = small_case(2, 3, 8, 0, device)
    own, place, function = getattr(case, change["name"]), change["place"], change["tensor"]
    if function is None:
        del own[place]
    elif isinstance(place, slice):
        own[place] = [function(tensor) for tensor in own]
    else:
        own[place] = function(own[place])
    with pytest.raises(ValueError, match=message):
        case.batch()


def test_a_batch_refuses_unknown_settings(device):
    case = small_case(2, 3, 8, 0, device)
    with pytest.raises(ValueError, match="input_precision is 'tf32', allowed: tf32x3, ieee"):
        case.batch(input_precision="tf32")
    with pytest.raises(ValueError, match=r"sign is 2, allowed: 1 \(fold\) and -1"):
        case.batch().fold(2)
    case.shape = case.shape._replace(axis=2)
    with pytest.raises(ValueError, match="axis is 2, allowed: 0"):
        case.batch()
    large = small_case(1, 129, 2, 0, device)
    with pytest.raises(RuntimeError, match="take blocks of up to 128, not 1 x 129"):
        large.batch()


def test_gradients_must_be_like_their_weights(device):
    case = small_case(2, 3, 8, 0, device)
    batch, gradient = case.batch(), case.gradients[0]
    for wrong, message in (
        ([gradient], "1 gradients for 2 weights"),
        ([gradient, gradient.half()], r"gradients\[1\] has dtype torch.float16"),
        (
            [gradient, gradient[:-1]],
            r"gradients\[1\] has shape \(14, 8\), its weight has \(15, 8\)",
        ),
        ([gradient, gradient.t().contiguous().t()], r"gradients\[1\] has stride \(1, 15\)"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.map_gradient(wrong)
