"""Which weights are trained as matrices, as llm-foundry builds an optimizer by name."""

import copy
import re

import pytest
import torch
from composer.models import HuggingFaceModel
from helpers import tiny_llama
from llmfoundry.utils.builders import build_optimizer
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGURATIONS, tiny_model

from apex_composer import find_sites
from apex_composer.methods.matrix_groups import OPTIMIZERS, PATTERN, add_matrix_group


def build(name: str, model=None, **settings):
    """As llm-foundry does with a YAML's `optimizer`."""
    config = {"optimizer": {"name": name, "lr": 1e-2, **settings}}
    before = copy.deepcopy(config)
    own = copy.deepcopy(add_matrix_group(config)["optimizer"])
    assert config == before
    wrapped = HuggingFaceModel(model or tiny_llama(), tokenizer=None)
    return wrapped, build_optimizer(wrapped, own.pop("name"), own)


def names_of(model, group) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_name_projections_are_matrices_and_all_others_are_not(name):
    model, optimizer = build(name)
    others, matrices = (names_of(model, group) for group in optimizer.param_groups)
    assert [group["matrices"] for group in optimizer.param_groups] == [False, True]
    assert matrices == {n for n, _ in model.named_parameters() if "_proj." in n}
    assert others | matrices == {n for n, _ in model.named_parameters()} and len(matrices) == 14
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == len(others | matrices)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_pattern_finds_the_weights_that_apex_expands(kind):
    """In every architecture; nothing else, such as embeddings, head or norms."""
    model = tiny_model(kind)
    expanded = {re.sub(r"\[.*", "", site.name) for site in find_sites(model)}
    found = {name for name, _ in model.named_parameters() if re.search(PATTERN, name)}
    # An encoder of images has attention as well, which apex leaves alone.
    assert {name for name in found if not name.startswith("vision_tower")} == expanded


def test_disabled_gradients_and_own_groups_are_kept():
    groups = [
        {"param_str_match": "norm", "weight_decay": 0.0},
        {"param_str_match": "mlp.*weight$", "matrices": True, "rank": 3},
    ]
    model, optimizer = build("galore", disable_grad="embed", param_groups=groups, weight_decay=0.1)
    assert not model.model.model.embed_tokens.weight.requires_grad
    rest, norms, matrices = optimizer.param_groups
    assert norms["weight_decay"] == 0 and not norms["matrices"] and rest["weight_decay"] == 0.1
    assert matrices["rank"] == 3 and len(matrices["params"]) == 6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_without_matrices_or_with_others_are_refused(name):
    groups = [{"param_str_match": "norm", "weight_decay": 0.0}]
    with pytest.raises(ValueError, match=f"optimizer: {name}: no trained parameter in the param"):
        build(name, param_groups=groups)
    with pytest.raises(ValueError, match=r"a parameter of shape \[32\] in the param groups"):
        build(name, param_groups=[{"param_str_match": "layers", "matrices": True}])
    for adapted in ("all-linear", ["q_proj"]):  # of the latter the others are found, frozen
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=adapted, r=2))
        with pytest.raises(ValueError, match="in a model that apex knows .without adapters."):
            build(name, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_of_groups_are_checked_too(name):
    group = {"param_str_match": PATTERN, "matrices": True}
    for given, error, told in (
        ({"matrix": True}, TypeError, "param_groups: unknown key 'matrix'. Did you mean 'matrices"),
        ({"seed": 1}, TypeError, "param_groups: unknown key 'seed'"),
        ({"lr": "fast"}, ValueError, "lr: got 'fast', allowed: a finite number of 0 or more"),
        ({"matrices": "yes"}, ValueError, "matrices: got 'yes', allowed: true, false"),
    ):
        with pytest.raises(error, match=f"{name}: {told}"):
            build(name, param_groups=[group | given])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharding_is_refused_before_anything_is_read(name, monkeypatch):
    """On one process llm-foundry takes no notice of it."""
    config = {"optimizer": {"name": name, "lr": 0.1}, "fsdp_config": {"sharding_strategy": "FULL"}}
    add_matrix_group(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"optimizer: {name}: got fsdp_config on several ranks"):
        add_matrix_group(config)
    add_matrix_group({**config, "fsdp_config": None})


def test_other_configurations_are_left_alone():
    for config in ({}, {"optimizer": {"name": "adamw"}}, {"optimizer": None}, None, []):
        assert add_matrix_group(config) is config
