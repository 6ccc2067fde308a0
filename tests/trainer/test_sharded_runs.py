"""The same training on one process and on ranks that share the weights, under Composer's Trainer.

Real processes with gloo: two in `make test`, two and four in `make test-long`.
"""

from pathlib import Path

import pytest
import torch
from helpers import TokenDataset, tiny_llama
from safetensors.torch import load_file
from sharded_loop import ODD, check_loops, check_shards, train_loop
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from worker_processes import train_on_ranks

from apex_composer.report.read_run import read_runs
from apex_composer.tools.merge import merge

# All is in float64 but for the norm by which FSDP2's gradients are clipped, which torch takes in
# float32: to 1e-6. AdamW divides by the size of a gradient, so that of six steps of lr 0.01 no more
# than 6e-8 differs, and of the operators' learning rate, which is three times as large, 2e-7.
WEIGHTS_BOUND, FACTORS_BOUND = 1e-7, 3e-7

WORKER = Path(__file__).with_name("shards_worker.py")


def modes(*names: str, **options) -> list[dict]:
    return [{"name": name, "mode": name, **options} for name in names]


# What is trained, on how many ranks in which way, and how it is saved after batch 4.
ROW_RUNS = [
    ("selected", "ddp", "full"),
    ("selected", "fsdp2", "full"),
    ("half", "fsdp2", "sharded"),
]
TRAINED = {
    "selected": {"trainable": "selected"},
    "half": {"trainable": "half", "trainable_share": 0.9},
}


def row_runs(folder: Path) -> list[tuple[int, list[dict]]]:
    """Runs that train rows only: on one process, on two ranks, and resumed there."""
    alone = [{"name": k, "mode": "plain", "settings": own} for k, own in TRAINED.items()]
    saving, resuming = [], []
    for trained, mode, kind in ROW_RUNS:
        name = f"{trained} {mode}"
        run = {"mode": mode, "settings": TRAINED[trained], "state_dict": kind}
        run["evaluated"] = mode == "fsdp2"
        saving.append({"name": name, **run, "save": str(folder / name)})
        load = folder / name / ("ep1-ba4-rank0.pt" if kind == "full" else "ep1-ba4")
        resuming.append({"name": f"{name} resumed", **run, "load": str(load)})
    return [(1, alone), (2, saving), (2, resuming)]


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict]]:
    """One process; two ranks in the three ways, runs that are looked at otherwise; rows."""
    pairs = modes("ddp", "fsdp1", "fsdp2") + modes("fsdp1_root", "fsdp2_root", fails=True)
    folder = tmp_path_factory.mktemp("logged")
    for mode in ("fsdp1", "fsdp2"):
        pairs.append({"name": f"{mode} logged", "mode": mode, "logged": str(folder / mode)})
    pairs += [{"name": "tampered", "mode": "fsdp2", "tampered": True}]
    rows = row_runs(tmp_path_factory.mktemp("rows"))
    found = train_on_ranks(
        WORKER, tmp_path_factory.mktemp("runs"), [(1, modes("plain")), (2, pairs), *rows]
    )
    return found | {"logged": read_runs([folder])}


@pytest.fixture(scope="module")
def single(ends) -> dict:
    """The run on one process."""
    return ends["plain"][0]


def compare(ranks: list[dict], expected: dict) -> None:
    """Weights to 1e-7, selections and scores equal, all the same bits on all ranks."""
    for own in ranks:
        assert own["history"] == ranks[0]["history"]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=0, atol=WEIGHTS_BOUND)
            assert torch.equal(own["weights"][name], ranks[0]["weights"][name])
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


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_train_what_one_process_trains(single, ends, mode):
    compare(ends[mode], single)
    assert sum(own["flops"] for own in ends[mode]) == single["flops"] > 0


def test_rank_0_logs_for_all_ranks(ends, single):
    """Scores, predicted tokens, a number that is spread over the ranks; and it changes nothing."""
    runs = {run.folder.name: run for run in ends["logged"]}
    for mode in ("fsdp1", "fsdp2"):
        compare(ends[f"{mode} logged"], single)
        run = runs[mode]
        assert run.loss.batches == [*range(6)] and run.validation["cc"].batches == [3, 6]
        assert run.metrics["spread"].values == [3.0] * 6
        labels = torch.stack([sample["labels"] for sample in TokenDataset(20, padded=True)])
        assert run.validation_tokens == {"cc": (labels[:, 1:] != -100).sum()}
        for stage, record in zip(run.stages, single["history"], strict=True):
            assert stage.advantageous == record["advantageous"]
            own = {name for name, unit in stage.units.items() if unit != "kv_head"}
            assert stage.scores.keys() == own and len(own) == 4


@pytest.mark.parametrize("mode", ["fsdp1_root", "fsdp2_root"])
def test_a_failed_step_is_folded_by_every_rank_alone(ends, single, mode):
    """Although a forward pass without gradients has left all weights gathered."""
    for own in ends[mode]:
        ((unfolded, restored),) = own["losses"]
        assert abs(unfolded - restored) > 1e-5
    compare(ends[mode], single)


def test_ranks_that_select_differently_stop(ends):
    for own in ends["tampered"]:
        assert "the selection of stage 0 differs between the ranks" in own["error"]
        assert "ranks [1] have" in own["error"]


@pytest.mark.parametrize(("trained", "mode"), [run[:2] for run in ROW_RUNS])
def test_two_ranks_train_the_rows_that_one_process_trains(ends, trained, mode):
    compare(ends[f"{trained} {mode}"], ends[trained][0])
    assert not any(own.get("frozen") for own in ends[f"{trained} {mode}"])
    for own, before in zip(
        ends[f"{trained} {mode} resumed"], ends[f"{trained} {mode}"], strict=True
    ):
        assert own["history"] == before["history"]
        for name, weight in before["weights"].items():
            assert torch.equal(own["weights"][name], weight), name
        for name, rows in before["state"]["rows"].items():
            for now, copied in zip(own["state"]["rows"][name]["rows"], rows["rows"], strict=True):
                assert torch.equal(now, copied), name


KINDS = ["fsdp1-full", "fsdp1-sharded", "fsdp2-full", "fsdp2-sharded"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Where two ranks have saved, in every way, after batch 4, inside the second stage."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def more_ends(checkpoints) -> dict[str, list[dict]]:
    """The runs that save and go on to the end, those that resume them, and those on four ranks."""
    resumed = {
        kind: {
            "state_dict": kind.split("-")[1],
            "load": str(checkpoints / kind / ("ep1-ba4-rank0.pt" if "full" in kind else "ep1-ba4")),
        }
        for kind in KINDS
    }
    saving, groups = [], {1: [], 2: [], 4: []}
    for kind, load in resumed.items():
        mode = kind.split("-")[0]
        save = {"state_dict": load["state_dict"], "save": str(checkpoints / kind)}
        saving.append({"name": kind, "mode": mode, **save})
        alone = "plain" if "full" in kind else "fsdp2"
        for ranks, own_mode in ((1, alone), (2, mode), (4, mode)):
            groups[ranks].append({"name": f"{kind} on {ranks}", "mode": own_mode, **load})
    four = modes("fsdp1", "fsdp2", "hsdp1", "loop_hsdp2")
    return train_on_ranks(WORKER, checkpoints / "out", [(2, saving), *groups.items(), (4, four)])


@pytest.mark.long
def test_resuming_on_as_many_ranks_is_exact(more_ends):
    for kind in KINDS:
        for own, before in zip(more_ends[f"{kind} on 2"], more_ends[kind], strict=True):
            assert own["history"] == before["history"]
            for key, weight in before["weights"].items():
                assert torch.equal(own["weights"][key], weight), (kind, key)
            for key, pair in before["state"]["factors"].items():
                assert all(map(torch.equal, own["state"]["factors"][key], pair)), (kind, key)


@pytest.mark.long
def test_resuming_on_another_number_of_ranks(more_ends, single):
    for kind in KINDS:
        compare(more_ends[kind], single)
        for ranks in (1, 4):
            compare(more_ends[f"{kind} on {ranks}"], more_ends[kind][0])


@pytest.mark.long
def test_a_sharded_checkpoint_becomes_one_file(more_ends, checkpoints, tmp_path):
    for mode in ("fsdp1", "fsdp2"):
        saved = torch.load(checkpoints / f"{mode}-full" / "ep1-ba4-rank0.pt", weights_only=False)
        dcp_to_torch_save(checkpoints / f"{mode}-sharded" / "ep1-ba4", tmp_path / mode)
        weights = torch.load(tmp_path / mode, weights_only=False)["state"]["model"]
        assert weights.keys() == saved["state"]["model"].keys()
        merge([checkpoints / f"{mode}-sharded" / "ep1-ba4"], tmp_path / f"{mode}-merged")
        merged = load_file(tmp_path / f"{mode}-merged" / "model.safetensors")
        for name, weight in saved["state"]["model"].items():
            assert torch.equal(weights[name], weight), name
            assert torch.equal(merged[name.removeprefix("model.")], weight), name


@pytest.mark.long
def test_four_ranks_and_replicas_train_what_one_process_trains(single, more_ends):
    for name in ("fsdp1", "fsdp2", "hsdp1"):
        compare(more_ends[name], single)
        ranks = more_ends[name][: 2 if name == "hsdp1" else 4]
        check_shards(ranks, {f"model.{n}": w for n, w in ranks[0]["whole"].items()})
    for own, replica in zip(more_ends["hsdp1"][:2], more_ends["hsdp1"][2:], strict=True):
        for shard, other in zip(own["shards"], replica["shards"], strict=True):
            assert shard[:3] == other[:3] and torch.equal(shard[3], other[3])
    check_loops(more_ends["loop_hsdp2"], train_loop(tiny_llama(**ODD, dtype=torch.float64)))
    empty = [stop == start for own in more_ends["fsdp1"] for _, start, stop, _ in own["shards"]]
    assert any(empty)
