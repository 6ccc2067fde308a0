"""Scripts of the tests in processes of their own, which begin the ranks that they need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def run_script(script: Path | str, *arguments: object, timeout: int = 300, **environment) -> None:
    """Run a script to its end; what it has printed is told where that is not a good one."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def train_on_ranks(
    worker: Path, out: Path, runs: list[tuple[int, list[dict]]]
) -> dict[str, list[dict]]:
    """Train so many times on so many ranks; what each of them saved, by run."""
    out.mkdir(exist_ok=True)
    run_script(worker, out, json.dumps(runs), timeout=600)
    return {
        run["name"]: [
            torch.load(out / f"{run['name']}-rank{rank}.pt", weights_only=True)
            for rank in range(ranks)
        ]
        for ranks, own in runs
        for run in own
    }
