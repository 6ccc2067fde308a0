"""What a result depends on besides the code: device, driver, versions, commit."""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT
from tqdm import tqdm

PACKAGES = ("torch", "triton", "transformers", "flash_attn", "liger_kernel")

# Dense bfloat16 products with float32 accumulation, in FLOP/s: half of the number with sparsity
# that NVIDIA's data sheets print. The first entry whose words are all in the device's name counts
# (as words: a GH200 is no H200).
_WITH_SPARSITY = (
    (("H200", "NVL"), 1671e12, "NVIDIA H200 data sheet, H200 NVL"),
    (("H200",), 1979e12, "NVIDIA H200 data sheet, H200 SXM"),
    (("H100", "NVL"), 1671e12, "NVIDIA H100 data sheet, H100 NVL"),
    (("H100", "PCIe"), 1513e12, "NVIDIA H100 data sheet, H100 PCIe"),
    (("H100", "HBM3"), 1979e12, "NVIDIA H100 data sheet, H100 SXM"),
    (("A100",), 624e12, "NVIDIA A100 data sheet"),
)


def peak_flops(device_name: str) -> tuple[float | None, str]:
    """The peak that utilisation is measured against, and where it is from; None where unknown."""
    found = set(device_name.replace("-", " ").split())
    if "MIG" not in found:  # a slice of a GPU has a part of its peak
        for words, sparse, source in _WITH_SPARSITY:
            if found.issuperset(words):
                return sparse / 2, f"{source}, half of the peak with sparsity"
    return None, f"no peak is known for {device_name}"


def choose_device(wanted: str) -> torch.device:
    """The device of a benchmark.

    Args:
        wanted: `cuda`, `cpu` (kernels interpreted: to try the scripts, its times mean nothing).

    Raises:
        SystemExit: if the kernels cannot run there, with the reason.
    """
    from apex_composer.triton_kernels import unavailable_reason

    device = torch.device(wanted)
    reason = unavailable_reason(device)
    if reason is not None:
        raise SystemExit(f"no benchmark on {device}: {reason}")
    return device


def needs_pytest() -> None:
    """Say what is missing, before any time on a GPU is spent.

    Raises:
        SystemExit: where pytest is not installed.
    """
    if find_spec("pytest") is None:
        raise SystemExit(
            "correctness is checked by the kernel tests, which need pytest: pip install pytest "
            "(or leave it out: run_all.py --parts bandwidth training_step)"
        )


def progress_bar(iterable: Iterable[Any], **options: Any) -> tqdm:
    """A bar on a terminal, and a line now and then in a file or a pipe, where every line stays.

    Not that of `apex_composer.data_prep`: a GPU machine need not have what that imports.

    Args:
        iterable: what is gone through.
        options: of tqdm.
    """
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30.0, **options)


def command_line(description: str, **settings: Any) -> ArgumentParser:
    """What every part takes; further options are added to it."""
    parser = ArgumentParser(description=description.splitlines()[0], **settings)
    parser.add_argument("--device", default="cuda", help="cpu interprets the kernels")
    parser.add_argument("--budget", type=float, help="seconds after which nothing more begins")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Inside, the process may multiply float32 in TF32, as Composer's DeviceGPU lets it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def device_name(device: torch.device) -> str:
    """As the driver calls it; on the CPU, that nothing was compiled."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (interpreted)"


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Date, device, driver, versions and commit.

    Args:
        device: of the benchmarks.
        commit: where the checkout is not a git repository; default asks git.
    """
    return {
        "date": now(),
        "device": device_name(device),
        "compiled": device.type == "cuda",
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit or _commit(),
    }


def now() -> str:
    """Date and time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def is_importable(package: str) -> bool:
    """Whether a package or module that only some machines have can really be imported."""
    try:
        import_module(package)
    except Exception:  # not there; or a wheel for another torch, whose C code raises whatever
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = _output(query)
    return found.splitlines()[0].strip() if found else None


def _commit() -> str | None:
    """The commit, with `+changes` where tracked files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("+changes" if changed and changed.strip() else "")


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
