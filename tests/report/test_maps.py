import base64
import io
import math
from dataclasses import replace

import numpy as np
from example_report import example_run, example_stage
from PIL import Image

from apex_composer.report import maps


def pixels(one: maps.Map) -> np.ndarray:
    content = base64.b64decode(one.image.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_heads_have_a_pixel_each_and_a_mark_where_they_are_selected():
    stage = example_stage(0, 0, layers=3, heads=8, channels=256)
    (one,) = maps.stage_maps(stage, "head")
    shown = pixels(one)
    assert shown.shape == (3, 8, 4) and (one.rows, one.columns, one.units) == (3, 8, 8)
    for layer in range(3):
        scores = np.array(stage.scores[f"layers.{layer}.attn"])
        scores -= scores.mean()
        strong = shown[layer, :, 3] > 0
        assert (shown[layer, strong & (scores > 0), :3] == maps.HIGH).all()
        assert (shown[layer, strong & (scores < 0), :3] == maps.LOW).all()
        best = stage.advantageous[f"layers.{layer}.attn"][0]
        assert f"M{best + 0.2:.1f} {layer + 0.5:.1f}h.6m-.3-.3v.6" in one.plus
    assert one.plus.count("M") == one.minus.count("M") == 3


def test_many_channels_share_columns_with_their_mean():
    stage = example_stage(0, 0, layers=2, heads=8, channels=130)
    scores, selected = maps.stage_maps(stage, "channel")
    assert pixels(scores).shape == pixels(selected).shape == (2, maps.MOST_COLUMNS, 4)
    assert scores.units == 130 and not scores.plus
    for values in (np.arange(130.0), np.ones(130)):
        starts = [column * 130 // 64 for column in range(65)]
        means = [values[a:b].mean() for a, b in zip(starts, starts[1:], strict=False)]
        np.testing.assert_allclose(maps._shared(values, 130, 64), means)


def test_average_norms_are_seen_as_above_and_below_their_layers_mean():
    stage = example_stage(0, 0, layers=1, heads=4, channels=256)
    (group,) = (name for name, unit in stage.units.items() if unit == "head")
    stage = replace(stage, scores={**stage.scores, group: [7.0, 7.0, 9.0, 5.0]})
    (one,) = maps.stage_maps(stage, "head")
    assert [tuple(pixel) for pixel in pixels(one)[0]] == [
        *[(0, 0, 0, 0)] * 2,
        (*maps.HIGH, 255),
        (*maps.LOW, 255),
    ]
    assert one.largest == 2


def test_scores_that_are_no_numbers_have_no_colour():
    stage = example_stage(0, 0, layers=1, heads=4, channels=256)
    for values in ([math.nan] * 4, [0] * 4):
        shown = replace(stage, scores={**stage.scores, "layers.0.attn": values})
        (one,) = maps.stage_maps(shown, "head")
        assert not pixels(one).any() and one.largest == 0


def test_kv_heads_have_maps_of_their_own():
    stage = example_stage(0, 0, layers=2, heads=4, channels=256)
    units = {name: "kv_head" if unit == "head" else unit for name, unit in stage.units.items()}
    (one,) = maps.stage_maps(replace(stage, units=units), "kv_head")
    assert one.title == "scores of KV heads" and one.units == 4


def test_kv_heads_without_scores_of_their_own_show_what_is_selected():
    stage = example_stage(0, 0, layers=2, heads=8, channels=16)
    units = {name: "kv_head" if unit == "head" else unit for name, unit in stage.units.items()}
    scores = {name: stage.scores[name] for name, unit in units.items() if unit == "channel"}
    (one,) = maps.stage_maps(replace(stage, units=units, scores=scores), "kv_head")
    assert one.title.startswith("selected") and one.rows == 2 and one.plus and one.minus


def test_without_scores_the_selected_sets_are_shown():
    stage = replace(example_stage(0, 0, layers=2, heads=8, channels=256), scores=None)
    (one,) = maps.stage_maps(stage, "head")
    assert one.title == "selected heads"
    best = stage.advantageous["layers.1.attn"][0]
    assert tuple(pixels(one)[1, best]) == (*maps.HIGH, 255)
    assert maps.stage_maps(replace(stage, units={}), "head") == []


def test_overlaps_are_means_over_the_layers_from_the_second_stage_on():
    found = maps.overlaps(example_run("apex", stages=2))
    assert [row[:2] for row in found] == [(1, "head"), (1, "channel")]
    np.testing.assert_allclose([row[2:] for row in found], [(0.6, 0.4)] * 2)
