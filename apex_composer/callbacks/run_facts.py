"""What a run's numbers depend on beside its settings: versions and devices."""

import platform
from collections.abc import Iterable
from importlib import metadata

PACKAGES = (
    "apex-composer",
    "llm-foundry",
    "mosaicml",
    "mosaicml-streaming",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """GPU or CPU with their number: `8 x NVIDIA H100 80GB HBM3`, `cpu, 2 threads`."""
    import torch  # the command line, which needs versions alone, does not wait for it

    from apex_composer.distributed import world_size

    if torch.cuda.is_available():
        return f"{world_size()} x {torch.cuda.get_device_name()}"
    return f"cpu, {world_size() * torch.get_num_threads()} threads"
