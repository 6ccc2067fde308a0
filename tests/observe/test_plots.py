"""Pictures: which are there, what stands on them, and that they are small and always the same."""

import numpy as np
import pytest

from apex_composer.observe.plots import write_plots
from apex_composer.observe.unit_plots import plot_deviations, plot_masking, plot_units
from apex_composer.observe.weight_plots import plot_changes, plot_ranks, plot_row_spaces

LAYERS = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def activations(layers: int = LAYERS, channels: int = 500) -> dict:
    random = np.random.default_rng(0)
    groups = {}
    for layer in range(layers):
        for unit, units in (("head", 8), ("channel", channels)):
            norms = np.exp(random.standard_normal(units))
            groups[f"model.layers.{layer}.{unit}s"] = {
                "unit": unit,
                "layer": layer,
                "mean_norm": norms.tolist(),
                "score": random.integers(-64, 65, units).tolist(),
                "std": float(norms.std()),
            }
    return {"protocol": "sequences", "samples": 64, "groups": groups}


def weights(**entry) -> dict:
    return {
        f"model.layers.{layer}.{projection}.weight": {
            "layer": layer,
            "projection": projection,
            "shape": [64, 64],
            **entry,
        }
        for layer in range(LAYERS)
        for projection in PROJECTIONS
    }


def ranks(overlap: float | None = 0.3) -> dict:
    side = {"advantageous_entropy_rank": 7.0, "disadvantageous_entropy_rank": 6.0}
    return {
        "weights": weights(
            numerical_rank=64,
            entropy_rank=48.0,
            selected_rows=8,
            row_space_overlap=overlap,
            overlap_by_chance=0.125,
            **side,
        )
    }


def delta(selected: float | None = 0.02) -> dict:
    sides = ("advantageous_change", "disadvantageous_change", "unselected_change")
    values = [2.0**-power for power in range(64)]
    found = weights(
        relative_change=0.01,
        singular_values=values,
        energy={"1": 0.75},
        **dict.fromkeys(sides, selected),
    )
    return {"base": "base", "weights": {**found, "lm_head.weight": {"relative_change": 0.1}}}


def masking(exact: float | None = 0.1) -> list[dict]:
    rows = [("none", 0.0, 8.0)]
    rows += [(side, s, 8 + 100 * s) for s in (0.1, 0.2) for side in ("lowest", "random", "top")]
    return [
        {"which": which, "share": share, "perplexity": value, "exact_match": exact}
        for which, share, value in rows
    ]


def labels_of(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_everything_that_was_measured_is_drawn_small_and_labelled(tmp_path):
    one = {
        "activations": activations(),
        "masking": masking(),
        "ranks": ranks(),
        "delta": delta(),
    }
    found = write_plots(tmp_path, {"base": {"ranks": ranks(None)}, "trained": one})
    assert [path.name for path in found] == [
        "deviations.svg",
        "ranks.svg",
        "heads-trained.svg",
        "channels-trained.svg",
        "masking-trained.svg",
        "row_spaces-trained.svg",
        "changes-trained.svg",
        "singular_values-trained.svg",
    ]
    for path in found:
        assert path.stat().st_size < 300_000, path
        assert path.read_text().count("<svg") == 1


def test_equal_results_are_equal_files_and_png_is_drawn_too(tmp_path):
    one = {"run": {"masking": masking()}}
    (first,), (second,) = write_plots(tmp_path / "a", one), write_plots(tmp_path / "b", one)
    assert first.name == "masking.svg" and first.read_bytes() == second.read_bytes()
    (image,) = write_plots(tmp_path, one, ".png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert write_plots(tmp_path, {"run": {}}) == []


def test_nothing_is_drawn_of_singular_values_where_nothing_has_changed(tmp_path):
    unchanged = delta(None)
    for entry in unchanged["weights"].values():
        entry["energy"] = None
    found = write_plots(tmp_path, {"run": {"delta": unchanged}})
    assert [path.name for path in found] == ["changes.svg"]


def test_a_map_of_heads_has_them_where_they_are():
    results = activations(layers=3)
    norms, scores = plot_units(results, "head", "run").axes[:2]
    group = results["groups"]["model.layers.2.heads"]
    mean = np.mean(group["mean_norm"])
    shown = [axes.collections[0].get_array()[2].tolist() for axes in (norms, scores)]
    assert shown[0] == pytest.approx([norm / mean for norm in group["mean_norm"]])
    assert shown[1] == pytest.approx([score / 64 for score in group["score"]])
    assert norms.yaxis_inverted() and norms.get_ylabel() == "layer"  # the first layer is on top


def test_bands_of_sorted_channels_hold_all_of_them():
    results = activations(layers=2)
    norms, scores = plot_units(results, "channel", "run").axes[:2]
    for axes, key, scale in ((norms, "mean_norm", None), (scores, "score", 64)):
        mesh = axes.collections[0]
        edges = mesh.get_coordinates()[0, :, 0]
        row = mesh.get_array()[1]
        values = np.array(results["groups"]["model.layers.1.channels"][key], float)
        assert edges[0] == 1 and edges[-1] == len(values) + 1
        expected = values.sum() / (scale or values.mean())
        assert (row * np.diff(edges)).sum() == pytest.approx(expected)
        assert (np.diff(row) <= 0).all()
    assert (norms.get_xscale(), scores.get_xscale()) == ("log", "linear")


def test_models_stand_side_by_side():
    figure = plot_deviations({"weak": activations(4), "strong": activations(4)})
    assert labels_of(figure) == ["weak", "strong"]
    assert [axes.get_title() for axes in figure.axes] == ["heads", "channels"]
    assert all(len(axes.lines) == 2 for axes in figure.axes)


def test_masking_has_a_second_panel_where_there_are_answers():
    assert [a.get_ylabel() for a in plot_masking(masking(None), "run").axes] == ["perplexity"]
    perplexity, exact = plot_masking(masking(), "run").axes
    assert list(perplexity.lines[2].get_xdata()) == [10, 20]
    assert exact.get_ylabel() == "exact match" and len(exact.lines) == 4


def test_weights_have_a_panel_for_each_projection():
    figure = plot_ranks({"base": ranks(), "stage 2": ranks()})
    assert [axes.get_title() for axes in figure.axes] == list(PROJECTIONS)
    entropy, numerical, *_ = figure.axes[0].lines
    assert set(entropy.get_ydata()) == {75} and set(numerical.get_ydata()) == {100}
    assert labels_of(figure) == ["base", "stage 2", "entropy", "numerical"]
    spaces = plot_row_spaces(ranks(), "run").axes[0].lines
    assert [line.get_ydata()[0] for line in spaces] == [7 / 8, 6 / 8, 0.3, 0.125]


def test_sides_of_a_change_are_drawn_where_units_were_selected():
    assert len(plot_changes(delta(), "run").axes[0].lines) == 4
    assert len(plot_changes(delta(None), "run").axes[0].lines) == 1
