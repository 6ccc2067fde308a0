"""What every test runs under: one thread, no network, a fixed seed, and triton's interpreter."""

import os
import signal
import time
from pathlib import Path

# A device node rather than torch.cuda: the settings below must be made before torch or triton is
# imported, here and in the processes that tests start.
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    OMP_NUM_THREADS="1",  # as torch.set_num_threads below, for child processes
    MPLBACKEND="agg",
)
# A shell's background job ignores Ctrl-C, and so would the processes that tests start to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
COMPILED = os.environ.get("TRITON_INTERPRET", "0") != "1"

import random  # noqa: E402
from importlib.util import find_spec  # noqa: E402

import numpy  # noqa: E402
import own_names  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

own_names.install()
# The same examples in every run, and any may take longer than 200 ms on a busy machine.
if find_spec("hypothesis"):  # the kernels' tests on a GPU machine do without it
    import hypothesis

    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("tests")
# Sums are split over threads in an order that depends on the machine's cores; one thread makes the
# bit-for-bit tests mean the same everywhere, and is faster on models this small.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def left_as_found():
    """Composer and llm-foundry begin a distributed run, of one rank, in the process of the tests.

    Processes that a later test forks would wait for its threads, which they do not have. A thread
    that still lets go of the last operation's tensors needs the interpreter's lock, which the
    group's destructor keeps while it waits for the thread: they get it before.
    """
    environment, begun = dict(os.environ), torch.distributed.is_initialized()
    yield
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized() and not begun:
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(config, items):
    """Leave out the tests marked `gpu` where there is no GPU, or its kernels are interpreted."""
    if COMPILED:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
