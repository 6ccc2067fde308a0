"""The predicted traffic: by hand, as ranks send it, and in the table that the benchmark prints."""

import comm_model
import pytest
from comm_model import EXCHANGES, SUMS, SiteSize, step_traffic
from helpers import linear_site
from simulated_ranks import random_operator, simulate, with_gradients


def test_a_step_by_hand():
    """4 rows of 10 numbers in 4 exchanges over 2 ranks: half of 160 numbers leave their rank."""
    exchanged, summed = step_traffic([SiteSize(0, 4, 10), SiteSize(1, 6, 10)], ranks=2)
    assert exchanged == 4 * 40 / 2 * 4
    assert summed == 4 * (4 * (2 + 2) + 6 * (2 + 3))
    assert step_traffic([SiteSize(0, 4, 10)], ranks=1)[0] == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_what_is_predicted(ranks):
    """With FSDP2's cuts between rows, and sizes that the ranks divide."""
    rows, columns = linear_site(16, 8, name="rows"), linear_site(8, 16, axis=1, name="columns")
    operators = with_gradients(
        random_operator(site, [1, 4, 6, 9, 13, 15], [0, 2, 3, 7, 8, 11]) for site in (rows, columns)
    )
    edges = [[list(range(0, 129, 128 // ranks))]] * 2

    def a_step(executor):
        executor.fold()  # of the step before
        executor._ranks.calls.clear()
        executor.map_gradient()
        executor.unfold()
        executor.fold()

    calls = [end["ranks"].calls for end in simulate(operators, edges, ranks, a_step)]
    exchanged, summed = step_traffic([SiteSize(0, 6, 8), SiteSize(1, 6, 8)], ranks, bytes_each=1)
    assert exchanged == sum(size for own in calls for name, size in own if name == "exchange")
    for own in calls:
        assert [size for name, size in own if name == "sum"] == [summed] * SUMS
        assert len(own) == EXCHANGES + SUMS


def test_the_benchmark_prints_a_line_per_rank_count(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["comm_model.py", "--ranks", "8", "512"])
    comm_model.main()
    printed = capsys.readouterr().out
    assert "TinyLLaMA-1.1B: 1.10 B" in printed and "Llama-2-7B: 6.74 B" in printed
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(lines) == 4
    # Of 4 x 12.5 % of the query, gate and up rows of 22 layers in fp32, 7 of 8 parts travel.
    moved = 4 * 22 * (256 + 2 * 704) * 2048 * 4 * 7 / 8 / 8
    assert float(lines[0].split("│")[3]) == pytest.approx(moved / 1e6, abs=0.05)
    # 6 for each number of a matrix, 12 for each layer, key and output of attention's queries.
    matrices = 1_100_048_384 - 2048 * 32000 - 45 * 2048  # without embeddings and norms
    flops = 8 * 4096 * (6 * matrices + 12 * 22 * 2048 * 4096)
    assert float(lines[0].split("│")[8]) == pytest.approx(flops / 400e12 * 1e3, abs=0.5)
