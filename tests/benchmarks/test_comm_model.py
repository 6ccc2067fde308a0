"""The predicted traffic: a case by hand, and the table that the benchmark prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from apex_composer.traffic import SiteSize, step_traffic

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "comm_model.py"


def test_a_step_by_hand():
    """4 rows of 10 numbers in 4 exchanges over 2 ranks: half of 160 numbers leave their rank."""
    sites = [SiteSize(0, 4, 10), SiteSize(1, 6, 10)]
    traffic = step_traffic(sites, ranks=2)
    assert traffic.exchanged == 4 * 40 / 2 * 4
    assert traffic.summed == 4 * (4 * (2 + 2) + 6 * (2 + 3))
    assert traffic.sent_by_rank(2) == traffic.exchanged / 2 + traffic.summed


def test_one_rank_sends_nothing():
    assert step_traffic([SiteSize(0, 4, 10)], ranks=1).sent_by_rank(1) == 0


def test_the_benchmark_prints_a_line_per_rank_count():
    command = [sys.executable, str(BENCHMARK), "--ranks", "8", "512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TinyLLaMA-1.1B: 1.10 B" in done.stdout and "Llama-2-7B: 6.74 B" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == 4
    # Of 4 x 12.5 % of the query, gate and up rows of 22 layers in fp32, 7 of 8 parts travel.
    moved = 4 * 22 * (256 + 2 * 704) * 2048 * 4 * 7 / 8 / 8
    assert float(lines[0].split("│")[3]) == pytest.approx(moved / 1e6, abs=0.05)
