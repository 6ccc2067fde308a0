"""A clock that is set back to 0 begins the run anew: exactly as a fresh run from these weights."""

import warnings
from pathlib import Path

import pytest
import torch
from composer import Callback, Trainer
from composer_run import StopAt, assert_same_weights, make_trainer

from apex_composer import APEX, StagewiseScheduler

STAGES, LR = 2, 1e-2
AGAIN = "the run's clock stands at 0 although apex has begun before"


class Watch(Callback):
    """The operators and the learning rate of every batch."""

    def __init__(self, apex: APEX):
        self.apex, self.operators, self.rates = apex, [], []

    def batch_start(self, state, logger):
        self.operators.append(len(self.apex._expander.operators))
        self.rates.append(state.optimizers[0].param_groups[0]["lr"])


class FailOnce(Callback):
    """Fails at an event of the first batch, or in the first assessment."""

    failed = False

    def run_event(self, event, state, logger):
        if event.value == "after_forward" and not self.failed:
            self.failed = True
            raise RuntimeError("no luck")


def build(*callbacks: Callback, stages=STAGES, **options) -> tuple[Trainer, APEX, Watch]:
    apex = APEX(stages=stages, threshold=0.25)
    count = stages if isinstance(stages, int) else len(stages)
    scheduler = StagewiseScheduler(stages, lr_multipliers=[1.0, 0.4][:count])
    watch = Watch(apex)
    options = {"schedulers": scheduler, "lr": LR, **options}
    return make_trainer(apex, callbacks=(watch, *callbacks), **options), apex, watch


def saved(folder: Path, *callbacks: Callback, stages=STAGES) -> str:
    """The last checkpoint of a run."""
    trainer, _, _ = build(*callbacks, stages=stages)
    trainer.fit()
    trainer.save_checkpoint(str(folder / "last.pt"))
    trainer.close()
    return str(folder / "last.pt")


def assert_same_run(trainer: Trainer, apex: APEX, watch: Watch, other: tuple) -> None:
    reference, expected, seen = other
    batches = len(seen.rates)
    assert watch.rates[-batches:] == seen.rates and watch.operators[-batches:] == seen.operators
    assert apex.history == expected.history and apex.lineage == []
    ends = [one.state.model.model.state_dict() for one in (trainer, reference)]
    assert_same_weights(*ends)


def fresh(checkpoint: str, duration: str = "6ba", stages=STAGES) -> tuple[Trainer, APEX, Watch]:
    """A run from a checkpoint's weights and moments that knows nothing else of it."""
    trainer, apex, watch = build(stages=stages)
    state = torch.load(checkpoint, weights_only=False)["state"]
    trainer.state.model.load_state_dict(state["model"])
    moments = dict(enumerate(state["optimizers"]["AdamW"]["state"].values()))
    optimizer = trainer.state.optimizers[0]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    trainer.state.max_duration = duration
    trainer.fit()
    assert len(watch.operators) == int(duration[:-2]) and set(watch.operators) == {14}
    return trainer, apex, watch


@pytest.mark.parametrize("stop", [None, 2, 4], ids=["finished", "in stage 0", "in stage 1"])
def test_a_second_fit_with_reset_time_begins_anew(stop, tmp_path):
    stops = [StopAt(stop)] if stop else []
    other = fresh(saved(tmp_path, *stops))
    trainer, apex, watch = build(*([StopAt(stop)] if stop else []))
    trainer.fit()
    trainer.state.max_duration = "6ba"
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.fit(reset_time=True)
    assert_same_run(trainer, apex, watch, other)


@pytest.mark.parametrize("stop", [None, 4], ids=["finished", "in stage 1"])
@pytest.mark.parametrize("how", ["reset_time", "load_ignore_keys"])
def test_a_checkpoint_with_its_clock_at_zero_begins_anew(how, stop, tmp_path):
    checkpoint = saved(tmp_path, *([StopAt(stop)] if stop else []))
    other = fresh(checkpoint)
    ignored = ["state/timestamp"] if how == "load_ignore_keys" else None
    trainer, apex, watch = build(load_path=checkpoint, load_ignore_keys=ignored)
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.fit(reset_time=how == "reset_time")
    assert_same_run(trainer, apex, watch, other)


def test_a_run_of_one_stage_begins_anew(tmp_path):
    checkpoint = saved(tmp_path, stages=1)
    other = fresh(checkpoint, stages=1)
    trainer, apex, watch = build(stages=1, load_path=checkpoint)
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.fit(reset_time=True)
    assert_same_run(trainer, apex, watch, other)


def test_a_new_beginning_may_have_another_length(tmp_path):
    other = fresh(saved(tmp_path), duration="8ba")
    trainer, apex, watch = build()
    trainer.fit()
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.fit(reset_time=True, duration="8ba")
    assert [record["start_batch"] for record in apex.history] == [0, 4]
    assert_same_run(trainer, apex, watch, other)


def test_a_new_beginning_may_have_other_settings(tmp_path):
    checkpoint = saved(tmp_path)
    apex = APEX(stages=["1ba", "2ba"], threshold=0.125, targets=["channel"])
    trainer = make_trainer(apex, load_path=checkpoint, max_duration="3ba")
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.fit(reset_time=True)
    assert [record["start_batch"] for record in apex.history] == [0, 1]


def test_a_clock_between_the_stages_is_refused():
    trainer, _, _ = build(StopAt(4))
    trainer.fit()
    trainer.state.timestamp = trainer.state.timestamp.copy(batch=2)
    trainer.state.max_duration = "6ba"
    told = "timestamp: the run stands at batch 2, but its stage 1 began at batch 3"
    with pytest.raises(ValueError, match=told):
        trainer.fit()


def test_a_refused_start_is_refused_again(tmp_path):
    checkpoint = saved(tmp_path, StopAt(4))
    trainer, apex, _ = build(load_path=checkpoint, stages=["4ba", "2ba"])
    with pytest.raises(ValueError, match="stages: "):
        trainer.fit()
    with pytest.raises(ValueError, match="stages: "):
        trainer.fit()
    assert apex.history == []


def test_a_first_batch_that_failed_is_a_cause_too():
    trainer, apex, _ = build(FailOnce())
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit()
    with pytest.warns(UserWarning, match=AGAIN + ".*or a first batch that failed"):
        trainer.fit()
    assert [record["start_batch"] for record in apex.history] == [0, 3]


def interrupt_once(model: torch.nn.Module) -> None:
    """Let the next forward pass be interrupted."""

    def interrupt(*_):
        handle.remove()
        raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(interrupt)


def interrupted_assessment(folder: Path, **options) -> str:
    """A checkpoint of a run that was interrupted before its first stage began."""
    trainer, _, _ = build(**options)
    interrupt_once(trainer.state.model.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.save_checkpoint(str(folder / "interrupted.pt"))
    trainer.close()
    return str(folder / "interrupted.pt")


def test_an_assessment_that_was_interrupted_begins_again_without_a_warning(tmp_path):
    other, expected, seen = build()
    other.fit()
    trainer, apex, watch = build(load_path=interrupted_assessment(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clock")
        trainer.fit()
    # Loading leaves a step of zero in AdamW's count (torch's own), so weights are not compared.
    assert watch.rates == seen.rates and watch.operators == seen.operators
    assert apex.history[0] == expected.history[0] and len(apex.history) == STAGES


def test_an_interrupted_assessment_in_mid_run_begins_again(tmp_path):
    checkpoint = saved(tmp_path, StopAt(3))
    with pytest.warns(UserWarning, match="loaded without the state of apex"):
        checkpoint = interrupted_assessment(
            tmp_path, load_path=checkpoint, load_ignore_keys=["state/algorithms"]
        )
    trainer, apex, watch = build(load_path=checkpoint)
    trainer.fit()
    assert [record["start_batch"] for record in apex.history] == [3]
    assert watch.operators == [14, 14, 14]
