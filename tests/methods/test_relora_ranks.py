"""ReLoRA on two processes, with DDP and with FSDP2, trains what one process trains."""

from pathlib import Path

import pytest
import torch
from worker_processes import run_script

WORKER = Path(__file__).with_name("relora_worker.py")


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> tuple[dict, list[dict]]:
    """The weights of one process, and those that each of two has of every run."""
    out = tmp_path_factory.mktemp("ranks")
    run_script(WORKER, out)
    alone, *ranks = (torch.load(out / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    return alone["plain"], ranks


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_process_trains(ends, mode):
    alone, ranks = ends
    for own in ranks:
        assert own[mode].keys() == alone.keys()
        for name, weight in alone.items():
            assert torch.equal(own[mode][name], ranks[0][mode][name]), name
            # In float64, of gradients that are added up in another order; AdamW divides by them.
            torch.testing.assert_close(own[mode][name], weight, rtol=0, atol=1e-7)


def test_a_sharded_run_goes_on_from_a_restart_bit_for_bit(ends):
    for own in ends[1]:
        for name, weight in own["fsdp2"].items():
            assert torch.equal(own["resumed"][name], weight), name
