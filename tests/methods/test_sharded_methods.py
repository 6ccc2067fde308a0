"""The methods on one process and on two ranks that share the weights or the batch.

Real processes with gloo: FSDP2 in `make test`, DDP and FSDP1 in `make test-long`.
"""

from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from sharded_loop import ODD
from worker_processes import train_on_ranks

# As in test_sharded_runs.py: all is in float64 but for the norm by which FSDP2 clips.
BOUND = 1e-7
WORKER = Path(__file__).with_name("methods_worker.py")
METHODS = ["gmt", "rmt", "hft", "act_regu"]
OTHERS = [(method, "ddp") for method in METHODS] + [("hft", "fsdp1"), ("act_regu", "fsdp1")]


def runs_of(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"name": f"{method} {mode}", "method": method, "mode": mode} for method, mode in pairs]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict]]:
    """Every method on one process, and on two with FSDP2; gradients with ties."""
    alone, pairs = ([(method, mode) for method in METHODS] for mode in ("plain", "fsdp2"))
    two = [*runs_of(pairs), {"name": "ties", "mode": "ties"}]
    return train_on_ranks(WORKER, tmp_path_factory.mktemp("runs"), [(1, runs_of(alone)), (2, two)])


@pytest.fixture(scope="module")
def more_ends(tmp_path_factory) -> dict[str, list[dict]]:
    """The other ways; a run of hft in FSDP2 that saves sharded checkpoints, and goes on."""
    folder = tmp_path_factory.mktemp("saved")
    run = {"method": "hft", "mode": "fsdp2", "state_dict": "sharded"}
    saving = {"name": "saving", **run, "save": str(folder)}
    resumed = {"name": "resumed", **run, "load": str(folder / "ep1-ba4")}
    replicas = 4, [{"name": "ties of replicas", "mode": "ties"}]
    two = 2, [*runs_of(OTHERS), saving, resumed]
    return train_on_ranks(WORKER, tmp_path_factory.mktemp("runs"), [two, replicas])


def compare(ranks: list[dict], alone: dict) -> None:
    start = tiny_llama(**ODD, dtype=torch.float64).state_dict()
    for own in ranks:
        assert own["weights"].keys() == alone["weights"].keys() == start.keys()
        assert own["penalties"] == pytest.approx(alone["penalties"], rel=1e-6)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=0, atol=BOUND)
            assert torch.equal(own["weights"][name], ranks[0]["weights"][name])
    moved = max(float((alone["weights"][n] - w).abs().max()) for n, w in start.items())
    assert moved > 1000 * BOUND


def compare_masks(ranks: list[dict], alone: dict) -> None:
    """Entry by entry, in the first batch."""
    for own in ranks:
        assert own["kept"].keys() == alone["kept"].keys()
        for name, kept in alone["kept"].items():
            assert torch.equal(own["kept"][name], kept), name


def compare_frozen(ranks: list[dict], alone: dict) -> None:
    """What does not move by a bit is what was frozen, and is given back in the end."""
    start = tiny_llama(**ODD, dtype=torch.float64).state_dict()
    still = {name for name, w in alone["weights"].items() if torch.equal(w, start[name])}
    assert len(still) == len(alone["frozen"]) > 0
    for own in ranks:
        assert {n for n, w in own["weights"].items() if torch.equal(w, start[n])} == still
        assert len(own["frozen"]) == len(still) and not own["still"]


def compare_all(method: str, ranks: list[dict], alone: dict) -> None:
    compare(ranks, alone)
    if method in ("gmt", "rmt"):
        compare_masks(ranks, alone)
    if method == "hft":
        compare_frozen(ranks, alone)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_what_one_process_trains(ends, method):
    compare_all(method, ends[f"{method} fsdp2"], ends[f"{method} plain"][0])


def test_gmt_keeps_a_share_of_whole_tensors(ends):
    for name, kept in ends["gmt plain"][0]["kept"].items():
        wanted = max(1, int(0.3 * kept.numel() + 0.5))
        # Embeddings of tokens that a batch does not have are zero, kept or not.
        assert int(kept.sum()) == wanted or ("embed" in name and int(kept.sum()) < wanted)


def check_ties(ranks: list[dict]) -> None:
    for own in ranks:
        masks = zip(own["found"], own["expected"], own["counts"], strict=True)
        for found, expected, count in masks:
            assert torch.equal(found, expected) and int(found.sum()) == count


def test_ties_in_sharded_gradients_are_those_of_whole_ones(ends):
    check_ties(ends["ties"])


@pytest.mark.long
def test_ties_in_replicas_of_shards(more_ends):
    check_ties(more_ends["ties of replicas"])


@pytest.mark.long
@pytest.mark.parametrize(("method", "mode"), OTHERS)
def test_other_ways_to_share(ends, more_ends, method, mode):
    compare_all(method, more_ends[f"{method} {mode}"], ends[f"{method} plain"][0])


@pytest.mark.long
def test_a_sharded_checkpoint_goes_on_with_the_same_bits(more_ends):
    for own, before in zip(more_ends["resumed"], more_ends["saving"], strict=True):
        for name, weight in before["weights"].items():
            assert torch.equal(own["weights"][name], weight), name
