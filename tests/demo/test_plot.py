import numpy as np
from PIL import Image
from results_fixture import example_losses, example_summary

from apex_composer.demo.plot import COLOURS, plot_losses, smooth


def test_smoothing_keeps_constants_and_averages_neighbours():
    np.testing.assert_allclose(smooth(np.full(7, 3.0), 4), 3.0)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0]), 3), [1.5, 1.0, 1.5])
    np.testing.assert_allclose(smooth(np.array([1.0]), 5), 1.0)


def test_the_picture_is_written_whole_and_shows_both_curves(tmp_path):
    losses = {"vanilla": example_losses(0.0), "apex": example_losses(-0.1)}
    plot_losses(tmp_path / "loss.png", losses, example_summary())
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 500_000
    for colour in COLOURS.values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(1) < 8).sum() > 200
