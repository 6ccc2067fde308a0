"""Whether the kernels can run for a device and a shape, and what every launch needs."""

import re
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch

from apex_composer.triton_kernels import tiles

# tf32 products, which float32 matrices are multiplied with, came with this generation (A100).
_OLDEST_CAPABILITY = (8, 0)
# From this generation on (RTX 50 is 12.0) triton's compiler breaks down on products before the
# release below (triton-lang/triton, pull request 6771).
_NEW_CAPABILITY = (11, 0)
_TRITON_FOR_NEW = (3, 3, 1)


def unavailable_reason(device: torch.device | str) -> str | None:
    """Why the kernels cannot run on tensors of `device`; None when they can.

    They run on CUDA devices from compute capability 8.0 on, and, for tests, on the CPU in
    processes that were started with TRITON_INTERPRET=1.

    Args:
        device: for example `cuda`, `cuda:1` or `cpu`.
    """
    device = torch.device(device)
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "Triton kernels run on CUDA devices: move the tensors there, or start the process "
            "with TRITON_INTERPRET=1 to have the kernels interpreted on the CPU (slow, for tests)"
        )
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the kernels are written for CUDA devices and the CPU's interpreter, not {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch (torch.cuda.is_available() is False)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return (
            f"{device} has compute capability {capability[0]}.{capability[1]}, the kernels need "
            f"{_OLDEST_CAPABILITY[0]}.{_OLDEST_CAPABILITY[1]} (A100) or newer"
        )
    return None


def monarch_unavailable_reason(device: torch.device | str, p: int, q: int) -> str | None:
    """Why the Monarch kernels cannot run for blocks of p x p and q x q; None when they can.

    Args:
        device: for example `cuda`, `cuda:1` or `cpu`.
        p: as in the factors.
        q: as in the factors.
    """
    device = torch.device(device)
    reason = unavailable_reason(device)
    if reason is not None:
        return reason
    if max(p, q) > tiles.LARGEST_BLOCK:
        return f"the kernels take blocks of up to {tiles.LARGEST_BLOCK}, not {p} x {q}"
    if device.type != "cuda":
        return None
    capability, version = torch.cuda.get_device_capability(device), _triton_version()
    if capability >= _NEW_CAPABILITY and version < _TRITON_FOR_NEW:
        return (
            f"triton {_dotted(version)} compiles no products for the compute capability "
            f"{_dotted(capability)} of {device}, {_dotted(_TRITON_FOR_NEW)} (torch 2.7.1) does"
        )
    needed = tiles.shared_memory(p, q)
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if needed > limit:
        return f"blocks of {p} x {q} need {needed:,} bytes of shared memory, {device} has {limit:,}"
    return None


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether triton interprets the kernels, as TRITON_INTERPRET=1 at its import makes it do."""
    import triton

    # Triton reads the variable when it decorates, so a kernel of its own tells what it does now.
    return not isinstance(triton.language.zeros, triton.runtime.JITFunction)


def require(device: torch.device, *block: int) -> None:
    """Raise where the kernels cannot run; given p and q, where those of such factors cannot.

    Raises:
        RuntimeError: with the reason.
    """
    reason = monarch_unavailable_reason(device, *block) if block else unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(reason)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current CUDA device: make it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def mark_written(*tensors: torch.Tensor) -> None:
    """Tell autograd that tensors were written in place, which it cannot see in a kernel."""
    torch.autograd.graph.increment_version(tensors)
