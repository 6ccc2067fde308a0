from argparse import Namespace

import pytest
from prep_throughput import misses, report

SECONDS = {"ours": 1.0, "llm-foundry": 5.0, "encode_batch": 1.2}
BOUNDS = {"least_speedup": 4.0, "most_overhead": 1.3, "least_gain": 1.5}


def measured(encode_batch_fast=0.9):
    """Two rounds of all sides, the second at half the speed."""
    seconds = SECONDS | {"encode_batch_fast": encode_batch_fast, "word-encoder": 0.5}
    return {
        side: [{"rate": 1 / (n * second), "core_rate": 1 / (n * second)} for n in (1, 2)]
        for side, second in seconds.items()
    }


def test_ratios_are_of_the_same_round():
    found = report(measured())
    ratios = {name: row["ratio"] for name, row in found.items() if "ratio" in row}
    assert ratios == {
        "speedup over llm-foundry": pytest.approx(5),
        "overhead over encode_batch": pytest.approx(1 / 1.2),
        "overhead over encode_batch_fast": pytest.approx(1 / 0.9),
        "gain of the word encoder": pytest.approx(1.8),
    }
    assert found["ours"]["least"] == 0.5 and found["ours"]["most"] == 1.0


def test_a_missed_bound_is_named_and_sides_may_be_left_out():
    assert misses(Namespace(**BOUNDS), report(measured())) == []
    [miss] = misses(Namespace(**BOUNDS), report(measured(encode_batch_fast=0.6)))
    assert miss == "gain of the word encoder is 1.20, the bound is 1.5"
    [miss] = misses(Namespace(**BOUNDS | {"most_overhead": 0.8}), report(measured()))
    assert miss.startswith("overhead over encode_batch is 0.83")
    few = {side: results for side, results in measured().items() if side == "ours"}
    assert misses(Namespace(**BOUNDS), report(few)) == []
