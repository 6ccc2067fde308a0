import re

import numpy as np

from apex_composer.report.drawing import (
    COLOURS,
    INK,
    MOST_POINTS,
    colour_and_dashes,
    draw,
    show_tokens,
    thin,
    visible,
)


def test_thinning_keeps_means_and_extremes():
    y = np.random.default_rng(0).normal(size=30_000)
    y[12_345] = 9.0
    line = thin(np.arange(30_000), y, 0, noisy=True, band=True)
    assert len(line.x) == len(line.y) == MOST_POINTS
    assert max(line.high) == 9.0 and min(line.low) == y.min()
    np.testing.assert_allclose(np.mean(line.y), y.mean())  # 30,000 values: bins of equal size
    assert (line.low <= line.y).all() and (line.y <= line.high).all()


def test_few_values_stay_as_they_are_and_what_is_not_finite_goes():
    line = thin([1, 2, 3], [5.0, float("nan"), 7.0], 0)
    assert list(line.x) == [1, 3] and list(line.y) == [5.0, 7.0] and line.low is None
    assert len(thin([], [], 0).x) == 0


def test_only_what_is_noisy_is_smoothed():
    steps = np.repeat([4.0, 1.0], 50)
    line = thin(np.arange(100), steps, 0)
    assert list(line.y) == list(steps)  # evaluations and learning rates: no value in between
    assert len(thin(np.arange(100), steps, 0, noisy=True).x) == 30
    assert len(thin(np.arange(1000), np.ones(1000), 0).x) == MOST_POINTS


def test_an_axis_leaves_out_what_would_hide_the_rest():
    falling = 3 + 3 / np.sqrt(np.arange(300) + 5)
    assert visible([thin(np.arange(300), falling, 0)]) is None
    assert visible([thin(np.arange(9), np.ones(9), 0)]) is None
    spiked = np.where(np.arange(300) == 200, 1e3, falling)
    low, high = visible([thin(np.arange(300), spiked, 0, noisy=True, band=True)])
    assert low < falling.min() and falling.max() < high < 10


def test_styles_are_apart():
    looks = {colour_and_dashes(style) for style in range(4 * len(COLOURS))}
    assert len(looks) == 4 * len(COLOURS)


def test_the_svg_takes_colours_and_font_from_the_page():
    given = {"label": 'a "b" <c>', "x_label": "x", "y_labels": ["y"]}
    lines = [thin([1, 2], [0.123456, 0.2], style) for style in range(2)]
    svg = draw("one", [lines], boundaries=[(1.5, None)], **given)
    assert svg.startswith('<svg role="img" aria-label="a &quot;b&quot; &lt;c&gt;" viewBox="0 0 400')
    for variable in ("var(--series-0)", "var(--series-1)", "currentColor", "var(--faint)"):
        assert variable in svg
    assert not re.search(rf"{INK}|#0a0b|http|xlink|font-family|<style|<image", svg)
    ids = set(re.findall(r'id="([^"]*)"', svg))
    assert set(re.findall(r"#([mp][0-9a-f]+)", svg)) <= ids
    assert not ids & set(re.findall(r'id="([^"]*)"', draw("two", [lines], **given)))
    assert svg == draw("one", [lines], boundaries=[(1.5, None)], **given)


def test_labels_keep_their_digits():
    svg = draw("d", [[thin([1, 2], [0.12345, 0.12346], 0)]], label="", x_label="", y_labels=[""])
    assert re.search(r">0\.1234\d+<", svg)


def test_tokens_for_people():
    assert [show_tokens(n) for n in (12, 2048, 1.5e6, 7.86e9)] == [
        "12",
        "2.05 k",
        "1.5 M",
        "7.86 B",
    ]
    assert show_tokens(float("nan")) == "unknown"
