"""Names in shared memory that only one run gives: `python own_names.py SCRIPT [ARGUMENT ...]`.

streaming names what a dataset shares after the first number that is free, and takes it some time
after it has looked: of two runs that start at the same moment one fails with a FileExistsError,
or its ranks look at different moments, disagree and wait for each other. Here every run counts
from a number of its own.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path


def numbers() -> Iterator[int]:
    """What this run may number its datasets with; the same on all of its ranks."""
    # Ranks have in common who started them.
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    owner = os.getpid() if ranks == 1 else os.getppid()
    return count(1_000_000 + 1_000 * owner)  # runs that are not tests start at 0


def install() -> None:
    """Let streaming count by `numbers` in this process and its forks, where it is installed."""
    try:
        from streaming.base.shared import prefix
    except ModuleNotFoundError:  # a GPU machine for the kernels alone
        return
    prefix._each_prefix_int = numbers


if __name__ == "__main__":
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
