"""The tests marked `numeric` under the CPU capabilities that are below this machine's: `make test`.

torch has kernels for several instruction sets and takes the best that the CPU has; MKL and oneDNN
do the same. What a test computes is rounded otherwise by each of them.
"""

import os
import subprocess
import sys

import torch

# By torch's name of the best: what it calls those below, and MKL's and oneDNN's of the same kind.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
NONE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBILITY",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
LOWER = {"AVX512": (AVX2, NONE), "AVX2": (NONE,), "SVE256": (NONE,)}


def main(*arguments: str) -> int:
    """Run them all, with the arguments for pytest; the status is 1 if any of them fails."""
    best = torch.backends.cpu.get_cpu_capability()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--disable-warnings",
        "-m",
        "numeric",
        *arguments,
    ]
    statuses = []
    for settings in LOWER.get(best, ()):
        print("\nNumeric tests with", *(f"{k}={v}" for k, v in settings.items()), flush=True)
        statuses.append(subprocess.run(command, env=os.environ | settings).returncode)
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
