"""Data parallel (DDP, gloo) against one process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("ranks_worker.py")


def train(folder: Path, ranks: int) -> list[dict]:
    """Run the worker on so many ranks; returns what each of them saved."""
    folder.mkdir()
    launcher = Path(sys.executable).with_name("composer")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [str(launcher), "-n", str(ranks), str(WORKER), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_two_ranks_train_what_one_process_trains(tmp_path):
    (single,) = train(tmp_path / "one", 1)
    first, second = train(tmp_path / "two", 2)
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key]), key
        torch.testing.assert_close(weight, single["weights"][key], rtol=0, atol=1e-9)
    for record, other, expected in zip(
        first["history"], second["history"], single["history"], strict=True
    ):
        assert record == other
        for key in ("advantageous", "disadvantageous", "samples", "start_batch"):
            assert record[key] == expected[key], key
    for name, (scores, _, samples) in single["scores"].items():
        assert torch.equal(first["scores"][name][0], scores) and first["scores"][name][2] == samples
