"""Whether a build of torch has code for a GPU, and which one to install where it has none."""

import re
from collections.abc import Sequence
from typing import Literal

_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
# The first architecture that came with Blackwell, and the first CUDA and torch that build for it.
_BLACKWELL, _CUDA, _TORCH = (10, 0), "12.8", (2, 7)
_INDEX = '--index-url as pytorch.org\'s page "Get started" gives it'


def runs_as(
    capability: tuple[int, int], architectures: Sequence[str]
) -> Literal["binary", "PTX"] | None:
    """How a build's code runs on a GPU: as it is, compiled by the driver at the start, or not.

    A binary `sm_XY` runs on GPUs of capability X.Y to X.9, PTX `compute_XY` on X.Y and all newer
    ones. With the suffix `a` both run on X.Y alone, with `f` within the family, X.Y to X.9 (CUDA
    programming guide, "compute capabilities"). GPUs of Jetson boards have builds of their own and
    are not told apart here.

    Args:
        capability: major and minor number, of `torch.cuda.get_device_capability`.
        architectures: of `torch.cuda.get_arch_list`.
    """
    found = set()
    for kind, major, minor, suffix in _parse(architectures):
        fits = major == capability[0] and minor <= capability[1]
        if suffix == "a":
            fits = (major, minor) == capability
        elif kind == "compute" and not suffix:
            fits = (major, minor) <= capability
        if fits:
            found.add("binary" if kind == "sm" else "PTX")
    return "binary" if "binary" in found else "PTX" if found else None


def _parse(architectures: Sequence[str]) -> list[tuple[str, int, int, str]]:
    """Kind, major and minor number, suffix; names of another form say nothing here."""
    matches = map(_ARCHITECTURE.fullmatch, architectures)
    return [(m[1], int(m[2]), int(m[3]), m[4]) for m in matches if m]


def which_build(capability: tuple[int, int], architectures: Sequence[str], version: str) -> str:
    """What to install for a GPU that a build has no code for.

    Args:
        capability: as for `runs_as`.
        architectures: as for `runs_as`.
        version: of the installed torch, without its build.
    """
    built = [(major, minor) for _, major, minor, _ in _parse(architectures)]
    release = tuple(map(int, version.split(".")[:2]))
    if capability < min(built, default=capability):
        return f"install torch built for an older CUDA, {_INDEX}: +cu126 has sm_50 to sm_90"
    if capability >= _BLACKWELL and capability > max(built, default=(0, 0)):
        if release == _TORCH:
            return f"pip install 'torch=={version}+cu128', {_INDEX} for CUDA {_CUDA}"
        newer = "2.7 or newer, " if release < _TORCH else ""
        return f"install torch {newer}built for CUDA {_CUDA} or newer, {_INDEX}"
    name = "sm_{}{}".format(*capability)
    return f"install a build of torch that has {name}, {_INDEX}"
