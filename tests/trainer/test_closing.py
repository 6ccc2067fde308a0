"""A trainer that closes, is collected, or shares its algorithm leaves ordinary models behind."""

import copy
import gc
import sys
import warnings
import weakref
from functools import cache

import pytest
import torch
from composer import Callback
from composer_run import StopAt, assert_same_weights, make_trainer, run
from helpers import TokenDataset, tiny_llama
from torch.utils.data import DataLoader

from apex_composer import APEX

SETTINGS = {"stages": ["2ba", "4ba"], "threshold": 0.25}
# Where hooks are looked at; triton's interpreter takes its time.
FUSED = {**SETTINGS, "fused_swiglu": True}


def small_llama(seed: int = 0):
    return tiny_llama(seed, layers=1)


def trained_in_part(apex: APEX, model):
    """A trainer in the middle of its second stage."""
    trainer = make_trainer(apex, model=model, callbacks=(StopAt(3),))
    trainer.fit()
    assert apex._expander.operators
    return trainer


def assert_without_hooks(model, optimizer) -> None:
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert "forward" not in module.__dict__, name
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@cache
def second_run(shared_model: bool) -> tuple[list, dict]:
    """History and weights of a run after another one, each with an algorithm of its own."""
    first_model = small_llama()
    trained_in_part(APEX(**FUSED), model=first_model).close()
    model = first_model if shared_model else small_llama(seed=1)
    apex, weights, _ = run(APEX(**FUSED), model=model)
    return apex.history, weights


@pytest.mark.parametrize("how", ["collected", "closed"])
@pytest.mark.parametrize("shared_model", [False, True])
def test_an_earlier_trainer_does_not_detach_the_next_ones_hooks(how, shared_model):
    history, expected = second_run(shared_model)
    apex, first_model = APEX(**FUSED), small_llama()
    first = trained_in_part(apex, model=first_model)
    second_model = first_model if shared_model else small_llama(seed=1)
    second = make_trainer(apex, model=second_model)
    if how == "closed":
        first.close()
    else:
        found = weakref.ref(first)
        del first
        gc.collect()
        assert found() is None
    second.fit()
    assert apex.history == history
    assert_same_weights(expected, second.state.model.model.state_dict())
    optimizer = second.state.optimizers[0]
    second.close()
    assert_without_hooks(second_model, optimizer)


def test_the_earlier_model_is_left_folded_and_free_of_hooks():
    apex, model = APEX(**FUSED), small_llama()
    first = trained_in_part(apex, model=model)
    effective = {name: weight.clone() for name, weight in model.state_dict().items()}
    second = make_trainer(apex, model=small_llama(seed=1))
    assert_without_hooks(model, first.state.optimizers[0])
    assert_same_weights(effective, model.state_dict())
    second.close()


def test_the_earlier_trainer_cannot_go_on_in_silence(tmp_path):
    apex = APEX(**SETTINGS)
    first = trained_in_part(apex, model=small_llama())
    second = make_trainer(apex, model=small_llama(seed=1))
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
        APEX(**SETTINGS), callbacks=(StopAt(3),), save_folder=str(tmp_path), save_interval="1ba"
    )
    saving.fit()
    saving.close()
    apex = APEX(**SETTINGS)
    loading = make_trainer(apex, load_path=str(tmp_path / "ep0-ba3-rank0.pt"))
    reference, expected, _ = run(APEX(**SETTINGS))
    trainer = make_trainer(apex)
    trainer.fit()
    assert apex.history == reference.history
    assert_same_weights(expected, trainer.state.model.model.state_dict())
    for opened in (loading, trainer):
        opened.close()


def test_a_refused_start_leaves_no_hooks():
    model = small_llama()
    trainer = make_trainer(APEX(**FUSED), model=model)
    frozen = model.model.layers[0].self_attn.q_proj.weight
    frozen.requires_grad = False
    with pytest.raises(ValueError, match="not trained by the optimizer"):
        trainer.fit()
    trainer.close()
    assert_without_hooks(model, trainer.state.optimizers[0])


class Fail(Callback):
    """Fails in the fourth batch, where operators exist, before the optimizer has stepped."""

    def after_train_batch(self, state, logger):
        if state.timestamp.batch.value == 3:
            raise RuntimeError("no luck")


def failed_in_a_batch(model):
    """A trainer that has not been closed after an error."""
    trainer = make_trainer(APEX(**SETTINGS), model=model, callbacks=(Fail(),))
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit()
    return trainer


def failed_in_a_step(model, apex: APEX | None = None):
    """The same, with base weights in place; and the effective ones."""
    trainer = trained_in_part(apex or APEX(**SETTINGS), model=model)
    effective = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer.state.max_duration = "6ba"

    def failing(*args, **kwargs):
        raise RuntimeError("no luck")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="no luck"):
        patch.setattr(sys.modules["torch.optim.adam"], "adam", failing)
        trainer.fit()
    return trainer, effective


def assert_close(weights: dict, expected: dict) -> None:
    """W + D - D + D instead of W + D: some roundings of float32 of weights below 1."""
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=name)


def on(trainer, *algorithms, optimizer=None, **options):
    """A further trainer on a trainer's model, and on its optimizer or another one."""
    model = trainer.state.model.model
    if optimizer is None:
        options["optimizer"] = lambda *args, **kwargs: trainer.state.optimizers[0]
    return make_trainer(*algorithms, model=model, **options)


OPEN = r"^algorithms: .*another run of apex.*call trainer.close\(\)"


@pytest.mark.parametrize("optimizer", [None, "new"], ids=["same optimizer", "new optimizer"])
def test_a_second_run_beside_one_that_failed_is_refused_until_that_is_closed(optimizer):
    first = failed_in_a_batch(small_llama())
    with pytest.raises(RuntimeError, match=OPEN):
        on(first, APEX(**SETTINGS), optimizer=optimizer)
    first.close()
    apex = APEX(**SETTINGS)
    second = on(first, apex, optimizer=optimizer)
    second.fit()
    assert len(second.state.optimizers[0]._optimizer_step_pre_hooks) == 1
    assert [record["start_batch"] for record in apex.history] == [0, 2]
    second.close()


def test_a_run_that_was_built_before_another_one_began_is_refused_at_its_start():
    model = small_llama()
    first, second = (
        make_trainer(APEX(**SETTINGS), model=model, callbacks=(StopAt(3),)) for _ in "12"
    )
    first.fit()
    with pytest.raises(RuntimeError, match=OPEN):
        second.fit()
    first.state.max_duration = "6ba"
    first.fit()  # which is not in its own way
    first.close()
    second.fit()
    second.close()


def test_a_copy_of_the_model_of_an_open_run_is_free():
    first = trained_in_part(APEX(**SETTINGS), model=small_llama())
    second = make_trainer(APEX(**SETTINGS), model=copy.deepcopy(first.state.model.model))
    second.fit()
    for trainer in (second, first):
        trainer.close()


def test_operators_of_a_run_that_failed_do_not_train_along():
    """A trainer without apex cannot refuse: the failed run's hooks have to let it pass."""
    ends = []
    for closed in (True, False):
        first = failed_in_a_batch(small_llama())
        if closed:
            first.close()
        second = on(first)
        second.fit()
        ends.append({n: t.clone() for n, t in second.state.model.model.state_dict().items()})
        for trainer in (second, first):
            trainer.close()
    assert_same_weights(*ends)


def test_base_weights_that_a_failed_step_left_are_not_trained_in_silence():
    first, effective = failed_in_a_step(small_llama())
    second = on(first)
    with pytest.raises(RuntimeError, match=r"base weights.*trainer.close\(\)"):
        second.fit()
    first.close()
    assert_close(first.state.model.model.state_dict(), effective)


def test_closing_adds_nothing_to_weights_that_have_moved_on():
    first, _ = failed_in_a_step(small_llama())
    second = on(first, optimizer="new")
    second.fit()
    after = {n: t.clone() for n, t in second.state.model.model.state_dict().items()}
    with pytest.warns(UserWarning, match="weights have changed since"):
        first.close()
    assert_same_weights(after, second.state.model.model.state_dict())
    assert_without_hooks(second.state.model.model, first.state.optimizers[0])
    second.close()


@pytest.mark.parametrize("how", ["eval", "predict"])
def test_effective_weights_are_evaluated_after_a_step_that_failed(how):
    model = small_llama()
    apex = APEX(**SETTINGS)
    trainer, effective = failed_in_a_step(model, apex)
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(apex._expander.running.folded))
    getattr(trainer, how)(DataLoader(TokenDataset(4), batch_size=4))
    assert seen == [True]
    assert_close(model.state_dict(), effective)
    trainer.close()


def test_an_earlier_trainer_may_still_evaluate():
    apex = APEX(**SETTINGS)
    first = trained_in_part(apex, model=small_llama())
    second, _ = failed_in_a_step(small_llama(seed=1), apex)
    first.eval(DataLoader(TokenDataset(4), batch_size=4))
    assert not apex._expander.running.folded
    for trainer in (first, second):
        trainer.close()


def test_a_checkpoint_of_before_this_callback_loads_without_a_warning(tmp_path):
    first = trained_in_part(APEX(**SETTINGS), model=small_llama())
    first.save_checkpoint(str(tmp_path / "new.pt"))
    first.close()
    saved = torch.load(tmp_path / "new.pt", weights_only=False)
    saved["state"]["callbacks"].pop("Closing", None)
    torch.save(saved, tmp_path / "old.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Closing")
        second = make_trainer(
            APEX(**SETTINGS), model=small_llama(), load_path=str(tmp_path / "old.pt")
        )
    second.fit()
    optimizer = second.state.optimizers[0]
    second.close()
    assert_without_hooks(second.state.model.model, optimizer)


def test_a_checkpoint_that_cannot_be_loaded_leaves_an_ordinary_model(tmp_path):
    model = small_llama()
    with pytest.raises(FileNotFoundError):
        make_trainer(APEX(**FUSED), model=model, load_path=str(tmp_path / "none.pt"))
    gc.collect()
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__, name
