"""What is counted on the meta device is what a real model and its operators have."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from tinyllama import TINYLLAMA

from apex_composer import APEX, Expander, find_sites
from apex_composer.tools.model_size import build_shapes, estimate_cost
from apex_composer.trainable.frozen import freeze_untrained


def model_settings(folder: Path, config: dict, **settings) -> dict:
    (folder / "config.json").write_text(json.dumps(config))
    model = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(folder)}
    return {"model": model | settings}


def test_tinyllama(tmp_path):
    config = model_settings(tmp_path, TINYLLAMA, config_overrides={"max_position_embeddings": 4096})
    model, apex = build_shapes(config), APEX()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.config.max_position_embeddings == 4096
    cost = estimate_cost(model, apex)
    found = {kind.kind: (kind.groups, kind.units, kind.selected) for kind in cost.kinds}
    assert found == {"heads": (22, 32, 4), "kv_heads": (22, 4, 0), "channels": (22, 5632, 704)}
    # Of a layer: q and o with n = 256 = 16 x 16, gate, up and down with n = 704 = 22 x 32.
    assert cost.sites == 22 * 5
    assert cost.parameters == 22 * (2 * 256 * 32 + 3 * 704 * 54)
    assert estimate_cost(model, APEX(expansion=False)).memory == 0
    assert estimate_cost(model, APEX(targets=["head"])).sites == 44


def test_the_operators_of_a_run_have_as_many_parameters(tmp_path):
    model, settings = tiny_llama(kv_heads=2), {"threshold": 0.25, "kv_heads": "expand"}
    expander = Expander(find_sites(model), **settings)
    with expander.assessing():
        model(torch.zeros(1, 4, dtype=torch.long))
    expander.begin_stage()
    for operator in expander.operators:
        operator.fold()
    factors = sum(factor.numel() for o in expander.operators for factor in o.factors)
    kept = sum(delta.numel() for o in expander.operators for delta in o._deltas)
    shapes = build_shapes(model_settings(tmp_path, model.config.to_dict()))
    cost = estimate_cost(shapes, APEX(**settings))
    assert (cost.sites, cost.parameters) == (len(expander.operators), factors)
    assert cost.memory == 4 * (4 * factors + kept)


@pytest.mark.parametrize("trainable", ["selected", "half", "disadvantageous"])
def test_the_rows_of_a_run_have_as_many_parameters(tmp_path, trainable):
    share = {"trainable_share": 0.84} if trainable == "half" else {}
    model, settings = tiny_llama(), {"threshold": 0.25, "trainable": trainable, **share}
    expander = Expander(find_sites(model), method="random", **settings)
    expander.begin_stage()
    rows = sum(part.copy.numel() for part in expander.training.parts())
    factors = sum(factor.numel() for o in expander.operators for factor in o.factors)
    shapes = build_shapes(model_settings(tmp_path, model.config.to_dict()))
    cost = estimate_cost(shapes, APEX(**settings))
    whole = 2 * 64 * 32 if trainable == "half" else 0
    assert (cost.rows, cost.parameters, cost.whole) == (rows, factors, whole)
    assert cost.share.trained == rows + factors + whole
    assert cost.gradients[1] == 32 * 32
    plain = tiny_llama()
    freeze_untrained(find_sites(plain), **settings)
    assert cost.trained == {name for name, p in plain.named_parameters() if p.requires_grad}


def test_mpt():
    settings = {"name": "mpt_causal_lm", "d_model": 64, "n_heads": 4, "n_layers": 2}
    settings |= {"vocab_size": 64, "max_seq_len": 32, "init_device": "meta"}
    model = build_shapes({"model": settings})
    apex = APEX(threshold=0.25)
    kinds = [kind.kind for kind in estimate_cost(model, apex).kinds]
    assert "channels" in kinds and "heads" in kinds


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "hf_t5"}, "model.name: got 'hf_t5', planned are"),
        ({"pretrained_model_name_or_path": "none/such"}, "'none/such' gives no configuration"),
        ({"config_overrides": {"max_positions": 1}}, 'does not have attribute "max_positions"'),
    ],
)
def test_models_that_cannot_be_planned_are_refused(tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        build_shapes(model_settings(tmp_path, TINYLLAMA, **settings))


def test_a_folder_without_a_configuration_says_so(tmp_path):
    settings = {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(tmp_path)}
    with pytest.raises(ValueError, match="the folder has no config.json"):
        build_shapes({"model": settings})
