"""Is this machine ready to train? Each check looks, changes nothing, and says what to do."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from apex_composer.callbacks.disk import GIGABYTE, free_bytes
from apex_composer.tools.shared_memory import find_stale
from apex_composer.tools.training_yaml import Settings, stream_folders

# The packages whose versions change what a run computes or how it starts.
PACKAGES = (
    "torch",
    "mosaicml",
    "llm-foundry",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "triton",
    "numpy",
)
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Docker gives containers 64 MB, with which data workers die of "Bus error".
LEAST_SHARED_MEMORY = 1_000_000_000
LEAST_DISK = 20 * GIGABYTE
# Loading torch from a slow disk takes most of it.
BACKEND_SECONDS = 120.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    status: Literal["ok", "warning", "failure"]
    text: str


Check = Callable[[], Iterator[Finding]]


def examine(config: Settings | None) -> Iterator[Finding]:
    """Look at this machine, and at what a YAML needs of it.

    Args:
        config: of `load_configuration`, or None.
    """
    yield from check_versions()
    yield from check_gpu(config)
    yield from check_distributed()
    yield from check_shared_memory()
    yield from check_disk_space(config)
    if config is not None:
        yield from check_data(config)
        yield from check_model_files(config)


def check_versions(constraints: Path = CONSTRAINTS) -> Iterator[Finding]:
    """Installed packages against the pins of a checkout, or the ranges of the installed package."""
    pins = _pins(constraints)
    wrong = []
    for name in PACKAGES:
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if name in pins and not pins[name].contains(installed.split("+")[0], prereleases=True):
            wrong.append(f"{name} {installed}, pinned {pins[name]}")
    if wrong:
        text = f"{'; '.join(wrong)}. Install with `make install`, or pip -c constraints.txt"
        yield Finding("versions", "warning", text)
    else:
        source = constraints.name if constraints.is_file() else "the package's requirements"
        yield Finding("versions", "ok", f"torch {version('torch')} and others, as {source} says")


def _pins(constraints: Path) -> dict:
    from packaging.requirements import Requirement

    lines = requires("apex-composer") or []
    if constraints.is_file():
        lines = constraints.read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        r.name: r.specifier for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def check_gpu(config: Settings | None) -> Iterator[Finding]:
    """GPUs, their precision, and flash-attn where a YAML asks for it."""
    import torch

    wanted = ((config or {}).get("model") or {}).get("attn_implementation")
    precision = (config or {}).get("precision")
    if not torch.cuda.is_available():
        bad = precision not in (None, "fp32")
        told = f", the YAML says {precision}" if bad else ""
        text = f"none: runs need `precision: fp32` here{told}"
        yield Finding("GPU", "failure" if bad else "warning", text)
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        bf16 = torch.cuda.is_bf16_supported()
        text = (
            f"{len(names)} x {names[0]}, bf16 {'yes' if bf16 else 'no'}, CUDA {torch.version.cuda}"
        )
        bad = precision == "amp_bf16" and not bf16
        yield Finding("GPU", "failure" if bad else "ok", text)
    try:
        yield Finding("flash-attn", "ok", version("flash-attn"))
    except PackageNotFoundError:
        needed = wanted == "flash_attention_2"
        text = "not installed" + (
            ", and the YAML asks for flash_attention_2: pip install 'apex-composer[gpu]', or "
            "attn_implementation: sdpa"
            if needed
            else "; attn_implementation: sdpa does without"
        )
        yield Finding("flash-attn", "failure" if needed else "ok", text)


def check_distributed(seconds: float = BACKEND_SECONDS) -> Iterator[Finding]:
    """Start the backend that training will use, in a process alone.

    Args:
        seconds: after which it counts as hanging.
    """
    command = [sys.executable, "-W", "ignore", "-m", "apex_composer.tools.backend_probe"]
    advice = (
        "Name the network interface in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO "
        "tells more"
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode == 0:
            text = f"{done.stdout.strip()} starts and reduces"
            yield Finding("distributed", "ok", text)
        else:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            yield Finding("distributed", "failure", f"{last}. {advice}")
    except subprocess.TimeoutExpired:
        text = f"no answer within {seconds:.0f} s. {advice}"
        yield Finding("distributed", "failure", text)
    # Left over in a shell, they make a single process wait for others for ever.
    stray = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
    if stray:
        text = f"{', '.join(stray)} are set in this shell: `composer` sets them itself, unset them"
        yield Finding("distributed", "warning", text)


def check_shared_memory() -> Iterator[Finding]:
    """Size of /dev/shm and what streaming left there."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("/dev/shm", "failure", "missing: data workers and streaming need it")
        return
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIGABYTE:.1f} GB free of {usage.total / GIGABYTE:.1f} GB"
    if usage.free < LEAST_SHARED_MEMORY:
        text += ": too small for data workers. Containers: --shm-size=16g, or --ipc=host"
    yield Finding("/dev/shm", "warning" if usage.free < LEAST_SHARED_MEMORY else "ok", text)
    stale, used = find_stale()
    if stale:
        text = (
            f"{len(stale)} segments without an owner (of killed runs), {len(used)} in use. They "
            "can stop the next run with FileExistsError: `apex-composer doctor --clean` offers to "
            "remove them"
        )
        yield Finding("streaming segments", "warning", text)
    else:
        yield Finding(
            "streaming segments",
            "ok",
            f"none without an owner, {len(used)} in use "
            "(or of processes that may not be looked into)",
        )


def check_disk_space(config: Settings | None) -> Iterator[Finding]:
    """Free disk for checkpoints and for temporary files."""
    places = {"temporary files": tempfile.gettempdir()}
    save_folder = (config or {}).get("save_folder")
    if save_folder is not None and "://" not in save_folder:
        places["save_folder"] = save_folder
    for name, folder in places.items():
        free = free_bytes(Path(folder))
        text = f"{free / GIGABYTE:.0f} GB free in {folder}"
        if free < LEAST_DISK:
            text += ". `apex-composer plan` tells what the checkpoints need"
        yield Finding(f"disk: {name}", "warning" if free < LEAST_DISK else "ok", text)


def check_data(config: Settings) -> Iterator[Finding]:
    """The training data's folders, or the addresses that they are filled from."""
    missing, found, remote = [], 0, 0
    for name, address, folder in stream_folders(config):
        if folder is not None and os.access(folder / "index.json", os.R_OK):
            found += 1
        elif address is not None:
            remote += 1
        else:
            missing.append(f"{name}: {folder}")
    if missing:
        text = (
            f"{len(missing)} streams have no readable index.json and no `remote`: "
            f"{'; '.join(missing)}. Prepare them with `apex-composer prep`, or correct the paths"
        )
        yield Finding("data", "failure", text)
    else:
        yield Finding("data", "ok", f"{found} streams are here, {remote} will be downloaded")


def check_model_files(config: Settings) -> Iterator[Finding]:
    """Whether the model's configuration is here, or a start needs the hub."""
    name = (config.get("model") or {}).get("pretrained_model_name_or_path")
    if name is None:
        return
    if Path(name).is_dir():
        good = (Path(name) / "config.json").is_file()
        text = str(name) if good else f"{name} has no config.json: give the folder of a saved model"
        yield Finding("model", "ok" if good else "failure", text)
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        yield Finding("model", "ok", f"{name} is in the cache")
    elif constants.HF_HUB_OFFLINE:
        text = f"{name} is no folder and not in the cache, and HF_HUB_OFFLINE is set"
        yield Finding("model", "failure", text)
    else:
        yield Finding("model", "warning", f"{name} will be downloaded by every node at the start")
