"""What half fine-tuning trains, and that the rest stands still."""

import copy
import gc
import logging

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.models import HuggingFaceModel
from composer.optim import DecoupledAdamW
from composer_run import assert_same_weights, make_trainer, run
from helpers import tiny_llama
from llmfoundry.callbacks import LayerFreezing
from tiny_models import CONFIGURATIONS, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import APEX, find_sites
from apex_composer.assessment.selection import seeded_generator
from apex_composer.methods.gmt import GMT
from apex_composer.methods.hft import HFT, draw, untrained


def frozen_names(model) -> list[str]:
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def freeze(model, share: float = 0.5, seed: int = 0) -> list[str]:
    for module in untrained(find_sites(model), share, seed):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return frozen_names(model)


def test_llama_2_7b_trains_52_percent():
    """Of the real sizes, on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # whose defaults are those of LLaMA-2-7B
    total = sum(p.numel() for p in model.parameters())
    assert total == 6_738_415_616
    names = freeze(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / total, 3) == 0.519
    layers = [[n for n in names if n.startswith(f"model.layers.{i}.")] for i in range(32)]
    assert sum(map(len, layers)) == len(names)
    assert all(sum("self_attn" in n for n in own) == 2 for own in layers)
    assert all(sum("norm" in n for n in own) == 1 for own in layers)
    assert sorted(sum("mlp" in n for n in own) for own in layers) == [1] * 16 + [2] * 16
    assert len({tuple(n.split(".", 3)[3] for n in own) for own in layers}) > 10


@pytest.mark.parametrize(
    ("sizes", "share", "wanted"),
    [
        ([4] * 5, 0.5, [2] * 5),
        ([3] * 4, 0.5, [1, 1, 2, 2]),
        ([3] * 3, 0.5, [1, 2, 2]),
        ([2] * 10, 0.05, [0] * 9 + [1]),
        ([5] * 3, 0.6, [3] * 3),
        ([1], 0.5, [1]),
        ([], 0.5, []),
    ],
)
def test_how_many_are_drawn(sizes, share, wanted):
    drawn = [draw(sizes, share, seeded_generator(seed)) for seed in range(8)]
    assert all(sorted(map(len, layers)) == wanted for layers in drawn)
    for layers in drawn:
        for size, places in zip(sizes, layers, strict=True):
            assert len(set(places)) == len(places) and set(places) <= set(range(size))
    if len(sizes) > 1:
        assert len({str(layers) for layers in drawn}) > 1


@pytest.mark.parametrize("model_type", [*CONFIGURATIONS])
def test_every_architecture(model_type):
    """Half of each kind of modules, with their biases; all that is outside of the layers."""
    model = tiny_model(model_type)
    names = set(freeze(model))
    assert names
    modules = {name.rpartition(".")[0] for name in names}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.rpartition(".")[0] not in modules), name
    sites = find_sites(model)
    for units in (("head", "kv_head"), ("channel",)):
        own = list({site.module: None for site in sites if site.group.unit in units})
        frozen = [module for module in own if not module.weight.requires_grad]
        assert len(frozen) == len(own) - int(len(own) / 2 + 0.5)
    for head in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert head.weight.requires_grad


def test_the_draw_depends_on_the_seed_alone():
    drawn = [freeze(tiny_llama(layers=4), seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, DecoupledAdamW])
def test_what_is_frozen_does_not_move_by_a_bit(optimizer, caplog):
    """Weight decay included; it has no optimizer state, and is given back in the end."""
    caplog.set_level(logging.INFO, logger="apex_composer")
    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    trainer = make_trainer(HFT(seed=3), model=model, optimizer=optimizer, settings=settings)
    frozen = frozen_names(model)
    assert frozen == freeze(tiny_llama(), seed=3)
    trainer.fit()
    held = {id(p) for p in trainer.state.optimizers[0].state}
    for name, parameter in model.named_parameters():
        assert torch.equal(start[name], parameter) == (name in frozen), name
        assert (id(parameter) in held) == (name not in frozen), name
    trained = sum(p.numel() for n, p in model.named_parameters() if n not in frozen)
    total = sum(p.numel() for p in model.parameters())
    assert f"hft: trained are {trained:,} of {total:,} parameters" in caplog.text
    trainer.close()
    assert not frozen_names(model)
    assert model.state_dict().keys() == start.keys()


def test_the_share_is_logged_and_the_seed_is_the_runs():
    model = tiny_llama()
    trained = sum(p.numel() for p in model.parameters())
    twin = tiny_llama()
    trained -= sum(twin.get_parameter(name).numel() for name in freeze(twin, 0.25, seed=17))
    freezing = LayerFreezing(["model.lm_head.weight"])  # llm-foundry's, behind all algorithms
    trained -= twin.lm_head.weight.numel()
    _, _, log = run(HFT(share=0.25), model=model, max_duration="1ba", callbacks=(freezing,))
    share = trained / sum(p.numel() for p in model.parameters())
    assert [value for _, value in log.data["hft/trained_share"]] == [share]
    assert [value for _, value in log.data["hft/trained_parameters"]] == [trained]
    assert f"{share:.1%}), drawn by seed 17" in log.hyperparameters["hft/trained"]


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    options = {"microbatch": 2, "max_duration": "4ba"}
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba"}
    _, weights, _ = run(HFT(), GradientClipping("norm", 0.5), **options, **saved)
    load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), **options}
    model = tiny_llama(seed=1)
    _, found, _ = run(GradientClipping("norm", 0.5), HFT(), model=model, **load)
    assert_same_weights(found, weights)
    state = torch.load(tmp_path / "ep0-ba2-rank0.pt", weights_only=False)["state"]
    moments = state["optimizers"]["AdamW"]["state"]
    frozen = freeze(tiny_llama(), seed=17)
    assert len(moments) == len(list(model.parameters())) - len(frozen)
    plain = HuggingFaceModel(tiny_llama(seed=1), tokenizer=None)
    plain.load_state_dict(state["model"])
    for told, other in (("seed", {"seed": 18}), ("share", {"share": 0.25})):
        with pytest.raises(ValueError, match=f"hft: {told}: the checkpoint was trained with"):
            make_trainer(HFT(**other), model=tiny_llama(), **load)


def test_a_next_round_draws_anew_from_the_weights(tmp_path):
    run(HFT(seed=1), max_duration="1ba", save_folder=str(tmp_path))
    load = {"load_path": str(tmp_path / "ep0-ba1-rank0.pt"), "load_weights_only": True}
    model = tiny_llama(seed=1)
    trainer = make_trainer(HFT(seed=2), model=model, **load)
    assert frozen_names(model) == freeze(tiny_llama(), seed=2) != freeze(tiny_llama(), seed=1)
    trainer.close()


def test_a_trainer_that_could_not_be_built_gives_back_too():
    model = tiny_llama()
    with pytest.raises(ValueError, match="allowed: one"):
        make_trainer(HFT(), GMT(), GMT(), model=model)
    gc.collect()
    assert not frozen_names(model)


def test_an_open_run_keeps_the_model_to_itself():
    model, algorithm = tiny_llama(), HFT()
    first = make_trainer(algorithm, model=model)
    with pytest.raises(ValueError, match="is frozen already.*close the Trainer"):
        make_trainer(algorithm, model=model)
    frozen = frozen_names(model)
    first.fit()
    first.close()
    second = make_trainer(algorithm, model=model)
    del first
    gc.collect()
    assert frozen_names(model) == frozen
    second.close()


def test_beside_an_apex_that_only_reports():
    apex = APEX(stages=1, expansion=False, threshold=0.25)
    weights = run(apex, HFT(), max_duration="2ba")[1]
    assert_same_weights(weights, run(HFT(), max_duration="2ba")[1])
    for settings in ({}, {"trainable": "selected"}):
        for order in (1, -1):
            with pytest.raises(ValueError, match="algorithms: got hft beside apex"):
                make_trainer(*[APEX(**settings), HFT()][::order])


def test_what_cannot_be_halved_is_refused():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="lm_head.weight is frozen already"):
        make_trainer(HFT(), model=model)
    model = tiny_llama()
    model.model.layers[1].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers\.1\.adapter holds a matrix that is neither"):
        make_trainer(HFT(), model=model)
    with pytest.raises(ValueError, match="hft: share: got 0, allowed: a number in"):
        HFT(share=0)
    with pytest.raises(ValueError, match="hft: seed: got -1, allowed: an integer of 0 or more"):
        HFT(seed=-1)
