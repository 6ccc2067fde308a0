"""The same training on one process and on two ranks that share the weights, in a plain loop.

Real processes with gloo. Under a trainer, with replicas and on more ranks: test_sharded_runs.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_loop
import torch
from helpers import tiny_llama
from sharded_loop import ODD, check_loops, check_shards, train_loop

MODES = ["fsdp1", "fsdp2"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict]]:
    """What two ranks are left with, by mode."""
    out = tmp_path_factory.mktemp("loops")
    done = subprocess.run(
        [sys.executable, sharded_loop.__file__, str(out), "2", *MODES],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return {mode: [load(out / f"{mode}-rank{rank}.pt") for rank in (0, 1)] for mode in MODES}


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_what_one_process_trains(ends, mode):
    check_loops(ends[mode], train_loop(tiny_llama(**ODD, dtype=torch.float64)))


def test_shards_are_what_this_rank_holds(ends):
    inside = {mode: check_shards(own, own[0]["weights"]) for mode, own in ends.items()}
    assert inside["fsdp1"], "the odd sizes are to make FSDP1 cut rows"
    assert not inside["fsdp2"]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_has_five_collectives_however_many_weights(ends, mode):
    for own in ends[mode]:
        assert sorted(own["calls"]) == ["all_reduce"] + ["all_to_all_single"] * 4
