"""The same training on one process and on ranks that share the weights, under Composer's Trainer.

Real processes with gloo: two in `make test`, two and four in `make test-long`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_loop import ODD, train_loop
from shards_worker import EVEN
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from apex_composer.traffic import EXCHANGES, SUMS, SiteSize, step_traffic

# All is in float64 but for the norm by which FSDP2's gradients are clipped, which torch takes in
# float32: to 1e-6. AdamW divides by the size of a gradient, so that of six steps of lr 0.01 no more
# than 6e-8 differs, and of the operators' learning rate, which is three times as large, 2e-7.
WEIGHTS_BOUND, FACTORS_BOUND = 1e-7, 3e-7

WORKER = Path(__file__).with_name("shards_worker.py")


def launch(out: Path, ranks: int, runs: list[dict]) -> dict[str, list[dict]]:
    """Train on so many ranks; what each of them saved, by run."""
    out.mkdir(exist_ok=True)
    launcher = Path(sys.executable).with_name("composer")
    done = subprocess.run(
        [str(launcher), "-n", str(ranks), str(WORKER), json.dumps(runs), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return {
        run["name"]: [
            torch.load(out / f"{run['name']}-rank{rank}.pt", weights_only=True)
            for rank in range(ranks)
        ]
        for run in runs
    }


def modes(*names: str, **options) -> list[dict]:
    return [{"name": name, "mode": name, **options} for name in names]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    """The run on one process."""
    return launch(tmp_path_factory.mktemp("one"), 1, modes("plain"))["plain"][0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, list[dict]]:
    """Two ranks: the three ways of sharding, and the runs that are looked at in other ways."""
    runs = modes("ddp", "fsdp1", "fsdp2") + [
        {"name": "even", "mode": "fsdp2", "even": True},
        {"name": "tampered", "mode": "fsdp2", "tampered": True},
    ]
    runs += modes("fsdp1_root", "fsdp2_root", fails=True)
    return launch(tmp_path_factory.mktemp("two"), 2, runs)


def compare(ranks: list[dict], expected: dict) -> None:
    """Weights to 1e-7, selections and scores equal, operators the same bits on all ranks."""
    for own in ranks:
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=0, atol=WEIGHTS_BOUND)
        for record, wanted in zip(own["history"], expected["history"], strict=True):
            for key in ("advantageous", "disadvantageous", "samples", "start_batch"):
                assert record[key] == wanted[key], key
        for name, norm in expected["norms"].items():
            assert norm > 0.003
            assert own["norms"][name] == pytest.approx(norm, rel=1e-5)
        for name, pair in expected["state"]["factors"].items():
            for side, factor in enumerate(pair):
                found = own["state"]["factors"][name][side]
                torch.testing.assert_close(found, factor, rtol=0, atol=FACTORS_BOUND)
                assert torch.equal(found, ranks[0]["state"]["factors"][name][side])
        for name, (scores, _, samples) in expected["state"]["scores"].items():
            found = own["state"]["scores"][name]
            assert torch.equal(found[0], scores) and found[2] == samples


def compare_shards(ranks: list[dict]) -> None:
    """The intervals tile every weight, and hold what the gathered weight holds there."""
    for places in zip(*(own["shards"] for own in ranks), strict=True):
        weight = ranks[0]["whole"][places[0][0].removeprefix("model.")].flatten()
        held = [(start, stop) for _, start, stop, _ in places if stop > start]
        assert [start for start, _ in held[1:]] == [stop for _, stop in held[:-1]]
        assert held[0][0] == 0 and held[-1][1] == len(weight)
        for _, start, stop, values in places:
            assert torch.equal(values, weight[start:stop])


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_train_what_one_process_trains(single, pairs, mode):
    compare(pairs[mode], single)


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2"])
def test_shards_are_what_this_rank_holds(pairs, mode):
    compare_shards(pairs[mode])


def compare_loops(ranks: list[dict], expected: dict) -> None:
    for own in ranks:
        assert own["executors"] == ["ShardedExecutor"]
        assert own["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=0, atol=1e-10)
            assert torch.equal(own["weights"][name], ranks[0]["weights"][name])
        for name, pair in ranks[0]["factors"].items():
            assert all(map(torch.equal, own["factors"][name], pair))


def test_cuts_fall_inside_rows():
    """The odd sizes are what makes the other tests worth their time."""
    hidden, channels = ODD["hidden"], ODD["channels"]
    width = ODD["heads"] * ODD["head_dim"]
    kv_width = ODD["kv_heads"] * ODD["head_dim"]
    layer = hidden * (2 * width + 2 * kv_width + 3 * channels) + 2 * hidden
    o_begins = hidden * (width + 2 * kv_width)
    assert o_begins + hidden * width < layer / 2  # rank 0 holds all of the attention
    assert (layer / 2 - o_begins - hidden * width) % hidden  # and ends inside a gate row


def sites_of(sizes: dict) -> list[SiteSize]:
    hidden, heads = sizes["hidden"], sizes["heads"]
    head = sizes.get("head_dim", hidden // heads)
    channels = 6  # 25 % of 24 and of 27, 6.75 rounded to 7 and down to one with a factor pair
    layer = [SiteSize(0, head, hidden)] * 3 + [SiteSize(0, channels, hidden)] * 2
    return (layer + [SiteSize(1, head, hidden), SiteSize(1, channels, hidden)]) * 2


def test_a_step_sends_what_is_documented(pairs):
    traffic = step_traffic(sites_of(EVEN), ranks=2)
    calls = [own["calls"] for own in pairs["even"]]
    for own in calls:
        names = [name for name, _ in own]
        assert names.count("all_to_all_single") == EXCHANGES
        assert names.count("all_reduce") == SUMS
        assert len(names) == EXCHANGES + SUMS
        assert [size for name, size in own if name == "all_reduce"] == [traffic.summed]
    sent = sum(size for own in calls for name, size in own if name == "all_to_all_single")
    assert sent == traffic.exchanged


def test_rows_cut_anywhere_cost_no_more_calls(pairs):
    """FSDP1: at most every selected number travels, and the entries of rows that are cut."""
    sites = sites_of(ODD)
    number = torch.float64.itemsize
    everything = EXCHANGES * number * sum(s.selected * s.free for s in sites if s.axis == 0)
    cut_rows = EXCHANGES * number * sum(s.selected for s in sites if s.axis == 1)
    for own in pairs["fsdp1"]:
        assert len(own["calls"]) == EXCHANGES + SUMS
    sent = sum(
        size for own in pairs["fsdp1"] for name, size in own["calls"] if name != "all_reduce"
    )
    assert 0 < sent <= everything + cut_rows
    assert not pairs["ddp"][0]["calls"]


@pytest.mark.parametrize("mode", ["fsdp1_root", "fsdp2_root"])
def test_a_failed_step_is_folded_by_every_rank_alone(pairs, single, mode):
    """Although a forward pass without gradients has left all weights gathered."""
    for own in pairs[mode]:
        ((unfolded, restored),) = own["losses"]
        assert abs(unfolded - restored) > 1e-5
    compare(pairs[mode], single)


def test_ranks_that_select_differently_stop(pairs):
    for own in pairs["tampered"]:
        assert "the selection of stage 0 differs between the ranks" in own["error"]
        assert "ranks [1] have" in own["error"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """Two ranks that save after batch 4, inside the second stage, and go on to the end."""
    folder = tmp_path_factory.mktemp("saved")
    runs = [
        {
            "name": f"{mode}-{kind}",
            "mode": mode,
            "state_dict": kind,
            "save": str(folder / f"{mode}-{kind}"),
        }
        for mode in ("fsdp1", "fsdp2")
        for kind in ("full", "sharded")
    ]
    return folder, launch(folder / "out", 2, runs)


def resumed(folder: Path, ranks: int, names: list[str], mode: str | None = None) -> dict:
    runs = []
    for name in names:
        own_mode, kind = name.split("-")
        file = "ep1-ba4-rank0.pt" if kind == "full" else "ep1-ba4"
        load = {"state_dict": kind, "load": str(folder / name / file)}
        runs.append({"name": name, "mode": mode or own_mode, **load})
    return launch(folder / f"resumed-{ranks}-{mode}", ranks, runs)


ALL = ["fsdp1-full", "fsdp1-sharded", "fsdp2-full", "fsdp2-sharded"]


@pytest.mark.long
def test_resuming_on_as_many_ranks_is_exact(checkpoints):
    folder, uninterrupted = checkpoints
    for name, ranks in resumed(folder, 2, ALL).items():
        for own, before in zip(ranks, uninterrupted[name], strict=True):
            assert own["history"] == before["history"]
            for key, weight in before["weights"].items():
                assert torch.equal(own["weights"][key], weight), (name, key)
            for key, pair in before["state"]["factors"].items():
                assert all(map(torch.equal, own["state"]["factors"][key], pair)), (name, key)


@pytest.mark.long
def test_resuming_on_another_number_of_ranks(checkpoints, single):
    folder, uninterrupted = checkpoints
    four = resumed(folder, 4, ALL)
    one = resumed(folder, 1, ["fsdp1-full", "fsdp2-full"], mode="plain")
    one |= resumed(folder, 1, ["fsdp1-sharded", "fsdp2-sharded"], mode="fsdp2")
    for name in ALL:
        compare(four[name], uninterrupted[name][0])
        compare(one[name], uninterrupted[name][0])
        compare(uninterrupted[name], single)


@pytest.mark.long
def test_a_sharded_checkpoint_becomes_one_file(checkpoints, tmp_path):
    folder, _ = checkpoints
    for mode in ("fsdp1", "fsdp2"):
        saved = torch.load(folder / f"{mode}-full" / "ep1-ba4-rank0.pt", weights_only=False)
        dcp_to_torch_save(folder / f"{mode}-sharded" / "ep1-ba4", tmp_path / mode)
        weights = torch.load(tmp_path / mode, weights_only=False)["state"]["model"]
        assert weights.keys() == saved["state"]["model"].keys()
        for name, weight in saved["state"]["model"].items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.long
def test_four_ranks_and_replicas_train_what_one_process_trains(single, tmp_path):
    ends = launch(tmp_path / "four", 4, modes("fsdp1", "fsdp2", "hsdp1", "loop_hsdp2"))
    loops = ends.pop("loop_hsdp2")
    for name, ranks in ends.items():
        compare(ranks, single)
        compare_shards(ranks[:2] if name.startswith("hsdp") else ranks)
    for own, replica in zip(ends["hsdp1"][:2], ends["hsdp1"][2:], strict=True):
        for shard, other in zip(own["shards"], replica["shards"], strict=True):
            assert shard[:3] == other[:3] and torch.equal(shard[3], other[3])
    compare_loops(loops, train_loop())
    empty = [stop == start for own in ends["fsdp1"] for _, start, stop, _ in own["shards"]]
    assert any(empty)
