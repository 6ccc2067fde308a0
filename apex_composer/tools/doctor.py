"""Is this machine ready to train? Each check looks, changes nothing, and says what to do."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.filesize import decimal

from apex_composer.callbacks.start_checks import free_bytes
from apex_composer.extras import installation
from apex_composer.tools.finding import Finding
from apex_composer.tools.install_checks import (
    check_extras,
    check_torch_build,
    check_versions,
    installed_version,
)
from apex_composer.tools.shared_memory import find_stale
from apex_composer.tools.training_yaml import Settings, local_save_folder, stream_folders

# Docker gives containers 64 MB, with which data workers die of "Bus error".
LEAST_SHARED_MEMORY = 1_000_000_000
LEAST_DISK = 20_000_000_000
# Loading torch from a slow disk takes most of it.
BACKEND_SECONDS = 120.0


def examine(config: Settings | None) -> Iterator[Finding]:
    """Look at this machine, and at what a YAML needs of it.

    Args:
        config: configuration of `load_configuration`, or None.
    """
    yield from check_versions()
    yield from check_extras()
    yield from check_torch_build()
    yield from check_gpu(config or {})
    yield from check_distributed()
    yield from check_shared_memory()
    yield from check_disk_space(config or {})
    if config is not None:
        yield from check_data(config)
        yield from check_model_files(config)


def check_gpu(config: Settings) -> Iterator[Finding]:
    """GPUs, their precision, and flash-attn where a YAML asks for it."""
    import torch

    precision = config.get("precision")
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        bad = precision == "amp_bf16" and not bf16
        text = (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, "
            f"bf16 {'yes' if bf16 else 'no'}, CUDA {torch.version.cuda}"
        )
        yield Finding("GPU", "failure" if bad else "ok", text)
    else:
        bad = precision not in (None, "fp32")
        told = f", the YAML says {precision}" if bad else ""
        text = f"none: runs need `precision: fp32` here{told}"
        yield Finding("GPU", "failure" if bad else "warning", text)
    if (config.get("model") or {}).get("attn_implementation") == "flash_attention_2":
        installed = installed_version("flash-attn")
        advice = (
            f"not installed, and the YAML asks for flash_attention_2: {installation('gpu')}, or "
            "attn_implementation: sdpa"
        )
        yield Finding("flash-attn", "ok" if installed else "failure", installed or advice)


def check_distributed(seconds: float = BACKEND_SECONDS) -> Iterator[Finding]:
    """Start the backend that training will use, in a process alone.

    Args:
        seconds: time after which it counts as hanging.
    """
    command = [sys.executable, "-W", "ignore", "-m", "apex_composer.tools.backend_probe"]
    status, text = "failure", f"no answer within {seconds:.0f} s"
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode == 0:
            status, text = "ok", f"{done.stdout.strip()} starts and reduces"
        else:
            text = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    if status == "failure":
        text += (
            ". Name the network interface in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; "
            "NCCL_DEBUG=INFO tells more"
        )
    yield Finding("distributed", status, text)
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
    small = usage.free < LEAST_SHARED_MEMORY
    text = f"{decimal(usage.free)} free of {decimal(usage.total)}"
    if small:
        text += ": too small for data workers. Containers: --shm-size=16g, or --ipc=host"
    yield Finding("/dev/shm", "warning" if small else "ok", text)
    stale, used = find_stale()
    if stale:
        text = (
            f"{len(stale)} segments without an owner (of killed runs), {len(used)} in use. They "
            "can stop the next run with FileExistsError: `apex-composer doctor --clean` offers to "
            "remove them"
        )
    else:
        text = (
            f"none without an owner, {len(used)} in use (or of processes that may not be looked "
            "into)"
        )
    yield Finding("streaming segments", "warning" if stale else "ok", text)


def check_disk_space(config: Settings) -> Iterator[Finding]:
    """Free disk for checkpoints and for temporary files."""
    places = {"temporary files": Path(tempfile.gettempdir())}
    folder = local_save_folder(config)
    if folder is not None:
        places["save_folder"] = folder
    for name, folder in places.items():
        free = free_bytes(folder)
        text = f"{decimal(free)} free in {folder}"
        if free < LEAST_DISK:
            text += ". `apex-composer plan` tells what the checkpoints need"
        yield Finding(f"disk: {name}", "warning" if free < LEAST_DISK else "ok", text)


def check_data(config: Settings) -> Iterator[Finding]:
    """The training data's folders, or the addresses that they are filled from."""
    dataset = (config.get("train_loader") or {}).get("dataset") or {}
    if dataset.get("hf_name") is not None:
        yield _check_examples(dataset)
        return
    missing, found, remote = [], 0, 0
    for name, address, folder in stream_folders(config):
        if folder is not None and os.access(folder / "index.json", os.R_OK):
            found += 1
        elif address is not None:
            remote += 1
        else:
            missing.append(f"{name}: {folder}")
    text = f"{found} streams are here, {remote} will be downloaded"
    if missing:
        text = (
            f"{len(missing)} streams have no readable index.json and no `remote`: "
            f"{'; '.join(missing)}. Prepare them with `apex-composer prep`, or correct the paths"
        )
    yield Finding("data", "failure" if missing else "ok", text)


def _check_examples(dataset: Settings) -> Finding:
    """Data of a finetuning loader, which reads a folder or a dataset of the hub."""
    name, split = str(dataset["hf_name"]), dataset.get("split")
    if not Path(name).is_dir():
        return Finding("data", "warning", f"{name} is no folder: it will be looked for on the hub")
    if any(Path(name).glob(f"{split}*")):
        return Finding("data", "ok", f"{name} has {split}")
    text = f"{name} has no {split}.jsonl: prepare it with `apex-composer prep-instruct`"
    return Finding("data", "failure", text)


def check_model_files(config: Settings) -> Iterator[Finding]:
    """Whether the model's configuration is here, or a start needs the hub."""
    name = (config.get("model") or {}).get("pretrained_model_name_or_path")
    if name is None:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    status, text = "ok", str(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            status, text = "failure", f"{name} has no config.json: give a saved model's folder"
    elif isinstance(try_to_load_from_cache(name, "config.json"), str):
        text = f"{name} is in the cache"
    elif constants.HF_HUB_OFFLINE:
        status = "failure"
        text = f"{name} is no folder and not in the cache, and HF_HUB_OFFLINE is set"
    else:
        status, text = "warning", f"{name} will be downloaded by every node at the start"
    yield Finding("model", status, text)
