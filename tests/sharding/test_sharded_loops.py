"""The same training on one process and on two ranks that share the weights, in a plain loop.

Real processes with gloo. Under a trainer, with replicas and on more ranks: test_sharded_runs.py.
"""

from pathlib import Path

import pytest
import sharded_loop
import torch
from helpers import tiny_llama
from sharded_loop import ODD, check_loops, check_shards, train_loop
from worker_processes import run_script

WHOLE = ["fsdp1", "fsdp2"]
ROWS = ["fsdp2 selected", "fsdp2 half", "ddp selected", "ddp half"]
MODES = [*WHOLE, *ROWS]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict]]:
    """What two ranks are left with, by mode."""
    out = tmp_path_factory.mktemp("loops")
    run_script(sharded_loop.__file__, out, 2, *MODES)
    return {mode: [load(out / f"{mode}-rank{rank}.pt") for rank in (0, 1)] for mode in MODES}


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("mode", WHOLE)
def test_two_ranks_train_what_one_process_trains(ends, mode):
    check_loops(ends[mode], train_loop(tiny_llama(**ODD, dtype=torch.float64)))


@pytest.mark.parametrize("mode", ROWS)
def test_two_ranks_train_the_rows_that_one_process_trains(ends, mode):
    way, rows = mode.split(" ")
    expected = train_loop(tiny_llama(**ODD, dtype=torch.float64), **sharded_loop.ROWS[rows])
    executors = expected["executors"] if way == "ddp" else sharded_loop.SHARDED
    check_loops(ends[mode], expected, executors)


def test_shards_are_what_this_rank_holds(ends):
    inside = {mode: check_shards(ends[mode], ends[mode][0]["weights"]) for mode in WHOLE}
    assert inside["fsdp1"], "the odd sizes are to make FSDP1 cut rows"
    assert not inside["fsdp2"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if "fsdp" in mode])
def test_a_step_has_five_collectives_however_many_weights(ends, mode):
    for own in ends[mode]:
        assert sorted(own["calls"]) == ["all_reduce"] + ["all_to_all_single"] * 4
