"""Compiles every kernel for GPUs that are not there, and prints what the machine code needs.

A driver that launches nothing stands in for CUDA's, and the package's own functions are called on
CPU tensors of real shapes: triton specialises and compiles as it would on a GPU. Nothing touches
the tensors' memory, so that it costs next to none. Needs a process without TRITON_INTERPRET:

    python tests/triton_kernels/compile_driver.py 80 90     # one JSON object per kernel
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

from monarch_case import LLAMA_2_7B, TINYLLAMA, Shape  # noqa: E402

from apex_composer.triton_kernels import (  # noqa: E402
    availability,
    monarch_kernels,
    norms,
    swiglu,
    tiles,
)
from apex_composer.triton_kernels.monarch import MonarchBatch  # noqa: E402

# Bytes that one program may use, from CUDA's programming guide, table of compute capabilities.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# Generations that compile as 8.0 does, but have less shared memory.
LIKE_80 = {86, 89}

KERNELS = {
    name: kernel
    for module in (monarch_kernels, norms, swiglu)
    for name, kernel in vars(module).items()
    if isinstance(kernel, triton.runtime.JITFunction) and not name.startswith("_")
}

# The other shapes are padded to the same tiles.
MONARCH = {shape.name: shape for shape in [*TINYLLAMA[:3], *LLAMA_2_7B[:2]]}
# The largest blocks, of larger shares of wider models.
LARGEST = {
    f"{what} in blocks of 64 and 128": Shape(what, 16384, 4096, 64, 128, axis)
    for axis, what in enumerate(("rows", "columns"))
}
# heads, head size, channels
ACTIVATIONS = {"TinyLLaMA": (32, 64, 5632), "LLaMA-2-7B": (32, 128, 11008)}
SAMPLES, TOKENS = 4, 4096


class _Utils:
    def __init__(self, capability: int):
        self.properties = {
            "max_shared_mem": SHARED_LIMITS[capability],
            "multiprocessor_count": 108,
            "warpSize": 32,
        }

    def load_binary(self, *_):
        # module, function, registers, spills and, from triton 3.4 on, threads
        loaded = (None, None, 0, 0, 1024)
        return loaded if hasattr(triton, "knobs") else loaded[:4]

    def get_device_properties(self, device):
        return self.properties


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments, **settings):
        pass


class CompileOnlyDriver:
    """What triton asks a driver for, for a GPU of the given compute capability (90 is 9.0)."""

    launcher_cls = _Launcher

    def __init__(self, capability: int):
        self.capability, self.utils = capability, _Utils(capability)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def monarch_calls(name: str, precision: str) -> None:
    """fold and map_gradient of three matrices."""
    _, size, width, p, q, axis, *_ = (MONARCH | LARGEST)[name]
    shapes = [(size, width) if axis == 0 else (width, size), (q, p, p), (p, q, q)]
    weights, lefts, rights = ([torch.empty(shape) for _ in range(3)] for shape in shapes)
    indices = [torch.empty(p * q, dtype=torch.int64) for _ in range(3)]
    batch = MonarchBatch(
        weights, lefts, rights, indices, indices, axis=axis, input_precision=precision
    )
    batch.fold()
    batch.map_gradient([torch.empty_like(weight) for weight in weights])


def activation_calls(name: str, dtype: torch.dtype) -> None:
    """Norms of heads and channels, SwiGLU with its statistics and its backward pass."""
    heads, head_size, channels = ACTIVATIONS[name]
    mask = torch.empty(SAMPLES, TOKENS, dtype=torch.bool)
    attended = torch.empty(SAMPLES, TOKENS, heads * head_size, dtype=dtype)
    gate = torch.empty(SAMPLES, TOKENS, channels, dtype=dtype, requires_grad=True)
    up, sums = torch.empty_like(gate, requires_grad=True), torch.empty(SAMPLES, channels)
    for one in (None, mask):
        norms.unit_square_sums(attended, head_size, one)
        norms.unit_square_sums(gate.detach(), 1, one)
        product = swiglu.swiglu(gate, up, sums, one)
    swiglu.swiglu(gate, up)
    # Not by backward(), whose threads would look for a CUDA context.
    pair = gate.detach(), up.detach()
    swiglu._backward(product.detach(), *pair, True, True)


def cases(*, few: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that is compiled; few: every kernel, and what needs most shared memory."""
    for name in [*([] if few else MONARCH), *LARGEST]:
        yield name, lambda name=name: monarch_calls(name, "tf32x3")
    if few:
        yield "TinyLLaMA in bfloat16", lambda: activation_calls("TinyLLaMA", torch.bfloat16)
        return
    name = "TinyLLaMA gate and up"
    yield f"{name}, ieee", lambda: monarch_calls(name, "ieee")
    for name in ACTIVATIONS:
        yield f"{name} in bfloat16", lambda name=name: activation_calls(name, torch.bfloat16)
    yield "TinyLLaMA in float32", lambda: activation_calls("TinyLLaMA", torch.float32)


def predicted_memory(case: str) -> int | None:
    """The shared memory that `tiles` says a case needs at most; None for activations."""
    shape = (MONARCH | LARGEST).get(case)
    return None if shape is None else tiles.shared_memory(shape.p, shape.q)


def compiled(kernel: triton.runtime.JITFunction) -> list:
    """The kernel's variants since its caches were cleared."""
    return [variant for caches in kernel.device_caches.values() for variant in caches[0].values()]


def resources(variant) -> dict[str, int]:
    """What a compiled kernel needs, from its machine code, and which accesses are vectors."""
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(variant.asm["cubin"])
        file.flush()
        command = [str(dump), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        key.lower(): int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")
    }
    found |= {"shared": variant.metadata.shared, "warps": variant.metadata.num_warps}
    patterns = {
        # cp.async brings what the next turns need; .cg is 16 bytes, .ca may be less
        "loads": r"ld\.global|cp\.async\.c[ag]",
        "loads_v4": r"ld\.global[^\n]*\.v4|cp\.async\.cg",
        "loads_v2": r"ld\.global[^\n]*\.v2",
        "stores_v4": r"st\.global[^\n]*\.v4",
        "matrix_products": r"mma\.sync|wgmma\.mma",
        "atomics": r"\b(?:red|atom)\.",
    }
    counts = {key: len(re.findall(p, variant.asm["ptx"])) for key, p in patterns.items()}
    return found | counts


def main() -> None:
    """Compile everything for the capabilities on the command line."""
    assert KERNELS, "this process interprets the kernels: start it without TRITON_INTERPRET"
    availability.unavailable_reason = lambda device: None
    for capability in map(int, sys.argv[1:]):
        driver.set_active(CompileOnlyDriver(capability))
        for case, call in cases(few=capability in LIKE_80):
            for kernel in KERNELS.values():
                kernel.device_caches.clear()
            call()
            for name, kernel in KERNELS.items():
                for variant in compiled(kernel):
                    line = {"capability": capability, "case": case, "kernel": name}
                    line["predicted"] = predicted_memory(case)
                    print(json.dumps(line | resources(variant)), flush=True)


if __name__ == "__main__":
    main()
