"""Runs that train rows only: what they refuse, freeze and leave behind."""

import copy

import pytest
import torch
from composer.algorithms import GradientClipping, LayerFreezing
from composer.utils import FSDP2Config, FSDPConfig
from composer_run import StopAt, assert_same_weights, make_trainer, run
from helpers import tiny_llama
from rows_run import apex

from apex_composer import APEX, find_sites
from apex_composer.trainable.check import check_model
from apex_composer.trainer.trained_rows import check_rows


def groups_of(optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def test_a_run_leaves_model_and_optimizer_as_they_were():
    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(apex(), model=model)
    optimizer = trainer.state.optimizers[0]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert "model.embed_tokens.weight" in frozen and "model.norm.weight" in frozen
    assert sum(map(len, groups_of(optimizer))) < len(list(model.parameters()))
    trainer.fit()
    # No memory for what is not trained, nor for whole gradients.
    assert len(optimizer.state) == 1 and all(p.grad is None for p in model.parameters())
    trainer.close()
    assert all(p.requires_grad for p in model.parameters()) and not optimizer.state
    assert groups_of(optimizer) == [[id(p) for p in model.parameters()]]
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
    for name in frozen:
        assert torch.equal(model.state_dict()[name], start[name]), name


@pytest.mark.parametrize("others", [{}, {"trainable": "all"}])
def test_a_model_that_an_open_run_has_frozen_is_refused(others):
    model = tiny_llama()
    first = make_trainer(apex(), model=model)
    with pytest.raises(RuntimeError, match="another run of apex still acts"):
        make_trainer(apex(**others), model=model)
    first.close()
    make_trainer(apex(**others), model=model).close()


def test_an_object_given_to_a_second_trainer_leaves_the_first():
    algorithm, models = apex(), [tiny_llama(), tiny_llama()]
    make_trainer(algorithm, model=models[0])
    second = make_trainer(algorithm, model=models[1])
    assert all(p.requires_grad for p in models[0].parameters())
    assert not all(p.requires_grad for p in models[1].parameters())
    second.fit()
    second.close()
    reference, weights, _ = run(apex())
    assert_same_weights(models[1].state_dict(), weights)


def test_an_error_in_a_step_leaves_the_effective_weights(monkeypatch):
    model = tiny_llama()
    trainer = make_trainer(apex(), model=model, callbacks=(StopAt(4),))
    trainer.fit()
    effective = copy.deepcopy(model.state_dict())

    def failing(self, copied, group):
        raise RuntimeError("no luck")

    monkeypatch.setattr("apex_composer.trainable.row_optimizer.RowAdamW._step", failing)
    trainer.state.max_duration = "6ba"
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit()
    assert_same_weights(model.state_dict(), effective)
    trainer.close()
    assert_same_weights(model.state_dict(), effective)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_are_refused_when_the_run_is_built(kind):
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"the optimizer is {kind.__name__}, allowed"):
        make_trainer(apex(), model=model, optimizer=kind, settings={"lr": 0.1})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "others", "told"),
    [
        ({}, [GradientClipping("adaptive", 0.1)], "clipping_type: got adaptive, allowed"),
        ({}, [LayerFreezing()], "^algorithms: got layer_freezing"),
        ({"trainable_share": 0.2}, [], "trainable_share: got 0.2, which cannot be met within 10 %"),
    ],
)
def test_what_cannot_work_is_refused_when_the_run_is_built(settings, others, told):
    model = tiny_llama()
    with pytest.raises(ValueError, match=told):
        make_trainer(apex(**settings), *others, model=model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fsdp_config": FSDPConfig()}, "FSDP1 gives no gradients.*FSDP_VERSION=2"),
        ({"fsdp_config": FSDP2Config(load_monolith_rank0_only=True)}, "load_monolith_rank0_only"),
    ],
)
def test_ways_of_sharding_without_gradients_of_rows_are_refused(changes, told):
    trainer = make_trainer()
    for name, value in changes.items():
        setattr(trainer.state, name, value)
    found = check_model(find_sites(trainer.state.model), 0.25, trainable="selected")
    with pytest.raises(ValueError, match=told):
        check_rows(trainer.state, found)


def test_param_groups_of_rows_alone_are_refused():
    """torch's checkpoints do not hold an empty one."""
    trainer = make_trainer()
    state = trainer.state
    found = check_model(find_sites(state.model), 0.25, trainable="selected")
    rows = [p for site in found.trained for p in site.parameters()]
    others = [p for p in state.model.parameters() if all(p is not row for row in rows)]
    state.optimizers = torch.optim.AdamW([{"params": others}, {"params": rows}], lr=0.1)
    with pytest.raises(ValueError, match="param group 1 holds nothing but weights of which only"):
        check_rows(state, found)


def test_half_needs_embeddings_that_are_trained():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad = False
    told = "embed_tokens.weight is not trained by the optimizer.*half trains embeddings"
    with pytest.raises(ValueError, match=told):
        make_trainer(apex("half"), model=model)


def test_settings_are_checked_at_construction():
    for settings, message in (
        ({"trainable": "some"}, "trainable: got 'some', allowed: all, selected, half"),
        ({"trainable_share": 2, "trainable": "half"}, "trainable_share: got 2"),
        ({"trainable_share": 0.1}, "trainable_share: got 0.1 with trainable: all"),
        ({"threshold": 0, "trainable": "selected"}, "threshold: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            APEX(**settings)
    assert APEX(threshold=0, trainable="half").trainable_share == 0.52
