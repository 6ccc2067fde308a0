import pytest
from prep_throughput import report

SECONDS = {
    "ours": 1.0,
    "ray": 1.1,
    "llm-foundry": 5.0,
    "encode_batch_fast": 0.9,
    "word-encoder": 0.5,
}


def measured():
    """Two rounds of all sides, the second at half the speed."""
    return {
        side: [{"rate": 1 / (n * second), "core_rate": 1 / (n * second)} for n in (1, 2)]
        for side, second in SECONDS.items()
    }


def test_ratios_are_of_the_same_round():
    found = report(measured())
    ratios = {name: row["ratio"] for name, row in found.items() if "ratio" in row}
    assert ratios == {
        "cost of Ray": pytest.approx(1.1),
        "speedup over llm-foundry": pytest.approx(5),
        "overhead over encode_batch_fast": pytest.approx(1 / 0.9),
        "gain of the word encoder": pytest.approx(1.8),
    }
    assert found["ours"]["least"] == 0.5 and found["ours"]["most"] == 1.0


def test_sides_may_be_left_out():
    found = report({side: results for side, results in measured().items() if side == "ours"})
    assert list(found) == ["ours"]
