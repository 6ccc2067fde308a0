import csv
import io
import math

import numpy as np
import pytest
from PIL import Image

from apex_composer.compare.plot import APEX, OTHERS, plot_rows
from apex_composer.compare.table import as_csv, as_markdown, last_loss, make_rows


def result(loss=2.0, share=1.0, seconds=(0.1, 0.2, 0.3), optimizer=8_000_000, method=0):
    return {
        "training_loss": [9.0, 4.0, 4.0, 3.0],
        "held_out_loss": loss,
        "trained_share": share,
        "step_seconds": list(seconds),
        "optimizer_bytes": optimizer,
        "method_bytes": method,
    }


RESULTS = {
    "base": [result(3.0, seconds=[0.5])] * 2,
    "full": [result(2.0), result(2.2)],
    "full_half_rate": [result(1.9), result(2.5)],
    "full_tuned": [],
    "apex_half": [result(1.8, share=0.52, method=500_000), result(1.9, share=0.52)],
    "lora": [],
}
BEST_OF = {"full_tuned": ["full", "full_half_rate"]}


@pytest.fixture
def rows():
    return make_rows(RESULTS, BEST_OF)


def test_rows_stand_in_the_yamls_order_and_have_all_seeds(rows):
    assert [row.method for row in rows] == [
        "base", "full", "full_half_rate", "full_tuned", "apex_half",
    ]  # fmt: skip
    full = rows[1]
    assert full.perplexity == [math.exp(2.0), math.exp(2.2)]
    assert full.mean_perplexity == pytest.approx((math.exp(2.0) + math.exp(2.2)) / 2)
    assert full.step_seconds == pytest.approx(
        {"median": 0.2, "lower_quartile": 0.125, "upper_quartile": 0.275}
    )
    assert (rows[0].step_seconds, rows[4].method_bytes) == (None, 500_000)


def test_the_best_is_that_of_the_first_seed(rows):
    # The half rate is worse in the mean; nobody would know before the other seeds.
    assert rows[3].note == "= full_half_rate" and rows[3].perplexity == rows[2].perplexity
    without = make_rows(RESULTS | {"full": []}, BEST_OF)
    assert "full_tuned" not in [row.method for row in without]


def test_the_training_loss_is_that_of_the_last_quarter():
    assert last_loss([9.0, 4.0, 4.0, 3.0]) == 3.0
    assert last_loss([9.0] * 6 + [1.0, 3.0]) == 2.0
    assert last_loss([5.0]) == 5.0


def test_the_csv_has_every_number_in_full(rows):
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["method"] for line in read] == [row.method for row in rows]
    full = read[1]
    assert float(full["perplexity_mean"]) == rows[1].mean_perplexity
    assert (float(full["perplexity_min"]), full["seeds"]) == (math.exp(2.0), "2")
    assert float(read[4]["against_full_mean"]) == pytest.approx(-0.25)
    assert float(read[4]["against_full_max"]) == pytest.approx(-0.2)
    assert read[0]["step_seconds_median"] == "" and full["optimizer_bytes"] == "8000000"


def test_the_markdown_is_a_table_with_the_seeds_spread(rows):
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| full | 100.0 % | 3.000 | 8.207 (7.389 to 9.025) | - "
        "| 0.200 (0.125 to 0.275) | 8.00 | 0.00 |"
    )
    assert "| full_tuned = full_half_rate |" in lines[5]
    assert "| +0.1000 (-0.1000 to +0.3000) |" in lines[4]  # seed by seed
    single = as_markdown(make_rows({"full": [result()]}, {}))
    assert "| 7.389 |" in single


def test_the_picture_is_written_whole_and_shows_both_kinds(tmp_path, rows):
    plot_rows(tmp_path / "perplexity.png", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["perplexity.png"]
    pixels = np.asarray(Image.open(tmp_path / "perplexity.png").convert("RGB")).reshape(-1, 3)
    for colour in (APEX, OTHERS):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(1) < 8).sum() > 200
