"""The methods on one process and on two ranks that share the weights or the batch.

Real processes with gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from sharded_loop import ODD

# As in test_sharded_runs.py: all is in float64 but for the norm by which FSDP2 clips.
BOUND = 1e-7
WORKER = Path(__file__).with_name("methods_worker.py")
RUNS = [
    ("gmt", "ddp"),
    ("gmt", "fsdp2"),
    ("rmt", "ddp"),
    ("rmt", "fsdp2"),
    ("hft", "ddp"),
    ("hft", "fsdp1"),
    ("hft", "fsdp2"),
    ("act_regu", "ddp"),
    ("act_regu", "fsdp1"),
    ("act_regu", "fsdp2"),
]


def resumed(folder: Path) -> tuple[list[dict], list[dict]]:
    """A run of hft in FSDP2 that saves sharded checkpoints, and one that goes on from there."""
    run = {"method": "hft", "mode": "fsdp2", "state_dict": "sharded"}
    save = {"name": "saving", **run, "save": str(folder)}
    return [save], [{"name": "resumed", **run, "load": str(folder / "ep1-ba4")}]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict]]:
    """What every rank saw of each run, by its name."""
    out = tmp_path_factory.mktemp("runs")
    methods = dict.fromkeys(method for method, _ in RUNS)
    alone = [{"name": method, "method": method, "mode": "plain"} for method in methods]
    pairs = [{"name": f"{method} {mode}", "method": method, "mode": mode} for method, mode in RUNS]
    saving, resuming = resumed(tmp_path_factory.mktemp("saved"))
    pairs += [{"name": "ties", "mode": "ties"}, *saving, *resuming]
    runs = [(1, alone), (2, pairs)]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out), json.dumps(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return {
        run["name"]: [
            torch.load(out / f"{run['name']}-rank{rank}.pt", weights_only=True)
            for rank in range(ranks)
        ]
        for ranks, own in runs
        for run in own
    }


@pytest.mark.parametrize(("method", "mode"), RUNS)
def test_two_ranks_train_what_one_process_trains(ends, method, mode):
    (alone,), ranks = ends[method], ends[f"{method} {mode}"]
    start = tiny_llama(**ODD, dtype=torch.float64).state_dict()
    for own in ranks:
        assert own["weights"].keys() == alone["weights"].keys() == start.keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=0, atol=BOUND)
            assert torch.equal(own["weights"][name], ranks[0]["weights"][name])
    moved = max(float((alone["weights"][n] - w).abs().max()) for n, w in start.items())
    assert moved > 1000 * BOUND


@pytest.mark.parametrize(("method", "mode"), [run for run in RUNS if run[0] in ("gmt", "rmt")])
def test_two_ranks_mask_what_one_process_masks(ends, method, mode):
    """Entry by entry; the number of gradients kept is that of whole tensors."""
    (alone,) = ends[method]
    for own in ends[f"{method} {mode}"]:
        assert own["kept"].keys() == alone["kept"].keys()
        for name, kept in alone["kept"].items():
            assert torch.equal(own["kept"][name], kept), name
            if method == "gmt" and "embed" not in name:
                assert int(kept.sum()) == max(1, int(0.3 * kept.numel() + 0.5)), name


def test_ties_in_sharded_gradients_are_those_of_whole_ones(ends):
    for own in ends["ties"]:
        for found, expected, count in zip(
            own["found"], own["expected"], own["counts"], strict=True
        ):
            assert torch.equal(found, expected) and int(found.sum()) == count


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_what_is_frozen_does_not_move_by_a_bit(ends, mode):
    (alone,) = ends["hft"]
    start = tiny_llama(**ODD, dtype=torch.float64).state_dict()
    still = {name for name, w in alone["weights"].items() if torch.equal(w, start[name])}
    assert len(still) == len(alone["frozen"]) > 0
    for own in ends[f"hft {mode}"]:
        same = {name for name, w in own["weights"].items() if torch.equal(w, start[name])}
        assert same == still and len(own["frozen"]) == len(still) and not own["still"]


def test_a_sharded_checkpoint_goes_on_with_the_same_bits(ends):
    for own, before in zip(ends["resumed"], ends["saving"], strict=True):
        for name, weight in before["weights"].items():
            assert torch.equal(own["weights"][name], weight), name
