"""A trainer that closes, is collected, or shares its algorithm leaves ordinary models behind."""

import gc
import weakref

import pytest
import torch
from composer import Callback
from composer_run import make_trainer, run
from helpers import tiny_llama

from apex_composer import APEX

SETTINGS = {"stages": ["2ba", "4ba"], "threshold": 0.25, "fused_swiglu": True}


class Stop(Callback):
    """Ends the fit in the middle of a stage, where operators exist."""

    def __init__(self, batch: int = 3):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            state.stop_training()


def trained_in_part(apex: APEX, model):
    """A trainer in the middle of its second stage."""
    trainer = make_trainer(apex, model=model, callbacks=(Stop(),))
    trainer.fit()
    assert apex._expander.operators
    return trainer


def assert_without_hooks(model, optimizer) -> None:
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert "forward" not in module.__dict__, name
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def assert_equal(first: dict, second: dict) -> None:
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize("how", ["collected", "closed"])
@pytest.mark.parametrize("shared_model", [False, True])
def test_an_earlier_trainer_does_not_detach_the_next_ones_hooks(how, shared_model):
    first_model = tiny_llama()
    trained_in_part(APEX(**SETTINGS), model=first_model).close()
    second_model = first_model if shared_model else tiny_llama(seed=1)
    start = {name: weight.clone() for name, weight in second_model.state_dict().items()}
    reference, expected, _ = run(APEX(**SETTINGS), model=second_model)

    apex, first_model = APEX(**SETTINGS), tiny_llama()
    first = trained_in_part(apex, model=first_model)
    second_model = first_model if shared_model else tiny_llama(seed=1)
    assert_equal(start, second_model.state_dict())
    second = make_trainer(apex, model=second_model)
    if how == "closed":
        first.close()
    else:
        found = weakref.ref(first)
        del first
        gc.collect()
        assert found() is None
    second.fit()
    assert apex.history == reference.history
    assert_equal(expected, second.state.model.model.state_dict())
    optimizer = second.state.optimizers[0]
    second.close()
    assert_without_hooks(second_model, optimizer)


def test_the_earlier_model_is_left_folded_and_free_of_hooks():
    apex, model = APEX(**SETTINGS), tiny_llama()
    first = trained_in_part(apex, model=model)
    effective = {name: weight.clone() for name, weight in model.state_dict().items()}
    second = make_trainer(apex, model=tiny_llama(seed=1))
    assert_without_hooks(model, first.state.optimizers[0])
    assert_equal(effective, model.state_dict())
    second.close()


def test_the_earlier_trainer_cannot_go_on_in_silence(tmp_path):
    apex = APEX(**SETTINGS)
    first = trained_in_part(apex, model=tiny_llama())
    second = make_trainer(apex, model=tiny_llama(seed=1))
    first.state.max_duration = "6ba"
    with pytest.raises(RuntimeError, match="this APEX object belongs to another Trainer"):
        first.fit()
    with pytest.raises(RuntimeError, match="this APEX object belongs to another Trainer"):
        first.save_checkpoint(str(tmp_path / "first.pt"))
    second.save_checkpoint(str(tmp_path / "second.pt"))
    second.fit()
    assert [record["start_batch"] for record in apex.history] == [0, 2]
    for trainer in (first, second):
        trainer.close()


def test_what_an_earlier_trainer_has_loaded_is_forgotten(tmp_path):
    saving = make_trainer(
        APEX(**SETTINGS), callbacks=(Stop(),), save_folder=str(tmp_path), save_interval="1ba"
    )
    saving.fit()
    saving.close()
    apex = APEX(**SETTINGS)
    loading = make_trainer(apex, load_path=str(tmp_path / "ep0-ba3-rank0.pt"))
    reference, expected, _ = run(APEX(**SETTINGS))
    trainer = make_trainer(apex)
    trainer.fit()
    assert apex.history == reference.history
    assert_equal(expected, trainer.state.model.model.state_dict())
    for opened in (loading, trainer):
        opened.close()


def test_a_refused_start_leaves_no_hooks():
    model = tiny_llama()
    trainer = make_trainer(APEX(**SETTINGS), model=model)
    frozen = model.model.layers[0].self_attn.q_proj.weight
    frozen.requires_grad = False
    with pytest.raises(ValueError, match="not trained by the optimizer"):
        trainer.fit()
    trainer.close()
    assert_without_hooks(model, trainer.state.optimizers[0])
