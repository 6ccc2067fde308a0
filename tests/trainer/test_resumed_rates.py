"""Stages that have begun keep their rates, whatever scheduler `fit` brings."""

from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from composer import Callback, Trainer
from composer.optim import ComposerScheduler, ConstantScheduler
from composer_run import assert_same_weights, make_trainer, state_of
from helpers import tiny_llama

from apex_composer import APEX, StagewiseScheduler

STAGES, LR = ["2ba", "4ba"], 1e-2


class Watch(Callback):
    """The learning rate of every batch; ends the first fit at a batch."""

    def __init__(self, stop: int | None = None):
        self.stop, self.rates = stop, []

    def batch_start(self, state, logger):
        self.rates.append(float(state.optimizers[0].param_groups[0]["lr"]))

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.stop:
            self.stop = None
            state.stop_training()


def stagewise(*multipliers: float) -> StagewiseScheduler:
    return StagewiseScheduler(STAGES, lr_multipliers=multipliers)


def build(watch: Callback, scheduler=None, **options) -> Trainer:
    return make_trainer(
        APEX(stages=STAGES), callbacks=(watch,), schedulers=scheduler, **{"lr": LR, **options}
    )


def saved(trainer: Trainer, folder: Path) -> str:
    trainer.save_checkpoint(str(folder / "last.pt"))
    trainer.close()
    return str(folder / "last.pt")


def test_another_scheduler_from_the_start_is_the_one_that_counts(tmp_path):
    watch = Watch(stop=3)
    trainer = build(watch, stagewise(1.0, 0.4))
    trainer.fit()
    watch.rates.clear()
    trainer.state.max_duration, watch.stop = "6ba", 4
    with pytest.warns(UserWarning, match="the run's clock stands at 0"):
        trainer.fit(reset_time=True, schedulers=stagewise(0.5, 0.2))
    assert watch.rates == pytest.approx([0.5 * LR] * 3 + [0.2 * LR])
    path = saved(trainer, tmp_path)
    build(Watch(), stagewise(0.5, 0.2), load_path=path).fit()
    with pytest.raises(ValueError, match=r"stage 0 .* with 0\.005, this run says 0\.01"):
        build(Watch(), stagewise(1.0, 0.4), load_path=path).fit()


def test_another_scheduler_on_the_way_has_the_rates_of_the_stages_that_have_begun():
    watch = Watch(stop=1)
    trainer = build(watch, stagewise(1.0, 0.4))
    trainer.fit()
    trainer.state.max_duration, watch.stop = "6ba", 3
    trainer.fit(schedulers=stagewise(1.0, 0.9))  # stage 1 has not begun
    trainer.state.max_duration = "6ba"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stage 1 .* with 0\.009, this run says 0\.004"):
            trainer.fit(schedulers=stagewise(1.0, 0.4))
    trainer.fit(schedulers=stagewise(1.0, 0.9))
    assert watch.rates == pytest.approx([LR] * 3 + [0.9 * LR] * 3)


def test_a_scheduler_that_comes_after_the_checkpoint_is_refused(tmp_path):
    """It could not see what the stages were trained at."""
    trainer = build(Watch(stop=3), stagewise(1.0, 0.4))
    trainer.fit()
    path = saved(trainer, tmp_path)
    late = build(Watch(), load_path=path)
    for _ in range(2):
        with pytest.raises(ValueError, match="stagewise: .* batch 3, .* when the Trainer is built"):
            late.fit(schedulers=stagewise(1.0, 0.9))
    watch = Watch()
    anew = build(watch, load_path=path)
    with pytest.warns(UserWarning, match="the run's clock stands at 0"):
        anew.fit(schedulers=stagewise(1.0, 0.9), reset_time=True)
    assert watch.rates == pytest.approx([LR] * 3 + [0.9 * LR] * 3)


def test_the_multiplier_has_no_effects():
    state = state_of("6ba", batch=3)
    before = vars(state).copy()
    assert stagewise(1.0, 0.4).multiplier(state) == 0.4
    assert vars(state) == before


def test_a_run_gets_the_callback_once():
    trainer = build(Watch(), stagewise(1.0, 0.4))
    trainer.fit()
    assert [type(c).__name__ for c in trainer.state.callbacks].count("StageRates") == 1


class Halved(ComposerScheduler):
    """Another scheduler around `stagewise`."""

    def __init__(self, inner: StagewiseScheduler):
        self.inner = inner

    def __call__(self, state, ssr=1.0):
        return 0.5 * self.inner(state, ssr)


def halved(inner: StagewiseScheduler):
    return lambda state: 0.5 * inner(state)


@pytest.mark.parametrize("around", [Halved, halved, partial])
def test_a_scheduler_within_another_one_is_checked_too(around, tmp_path):
    with pytest.raises(ValueError, match="stages: the scheduler stagewise ends them at .*3ba"):
        build(Watch(), around(StagewiseScheduler(["3ba", "3ba"], lr_multipliers=[1.0, 0.4])))
    watch = Watch(stop=3)
    trainer = build(watch, around(stagewise(1.0, 0.4)))
    trainer.fit()
    assert watch.rates == pytest.approx([(1.0 if around is partial else 0.5) * LR] * 3)
    resumed = build(Watch(), around(stagewise(0.3, 0.4)), load_path=saved(trainer, tmp_path))
    with pytest.raises(ValueError, match="lr x lr_multipliers: stage 0 has begun with 0.01"):
        resumed.fit()


def test_of_several_schedulers_the_last_one_has_the_first_batch_too():
    watch = Watch()
    build(watch, [stagewise(0.5, 0.1), ConstantScheduler(alpha=0.7)]).fit()
    assert watch.rates == pytest.approx([0.7 * LR] * 6)


def test_another_kind_of_scheduler_has_the_first_batch_to_itself():
    watch = Watch()
    trainer = build(watch, stagewise(1.0, 0.4))
    trainer.fit()
    watch.rates.clear()
    with pytest.warns(UserWarning, match="the run's clock stands at 0"):
        trainer.fit(reset_time=True, schedulers=ConstantScheduler(alpha=0.7))
        trainer.fit(reset_time=True)
    assert watch.rates == pytest.approx([0.7 * LR] * 12)


@pytest.mark.parametrize("kind", [torch.tensor, numpy.float32, numpy.float64])
def test_a_rate_of_another_kind_of_number_resumes_bit_for_bit(kind, tmp_path):
    def run(watch: Watch, **options) -> Trainer:
        settings = {"lr": kind(LR), "foreach": False}
        trainer = build(watch, stagewise(1.0, 0.4), settings=settings, **options)
        trainer.fit()
        return trainer

    models = [tiny_llama() for _ in range(3)]
    whole, first, second = Watch(), Watch(stop=3), Watch()
    run(whole, model=models[0]).close()
    path = saved(run(first, model=models[1]), tmp_path)
    run(second, model=models[2], load_path=path).close()
    assert first.rates + second.rates == whole.rates
    assert whole.rates == [float(kind(LR))] * 3 + [float(kind(LR) * 0.4)] * 3  # in its precision
    assert_same_weights(models[0].state_dict(), models[2].state_dict())
