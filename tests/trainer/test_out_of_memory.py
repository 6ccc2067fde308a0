"""Memory that runs out: smaller microbatches, and no sample counts twice."""

import warnings
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer_run import (
    BATCH_SIZE,
    Batches,
    assert_same_scores,
    assert_same_weights,
    final_scores,
    make_trainer,
    run,
)
from helpers import tiny_llama
from worker_processes import run_script

from apex_composer import APEX

WORKER = Path(__file__).with_name("out_of_memory_worker.py")
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB (test)"


class SmallMemory:
    """Makes a model's evaluation fail as on a GPU, where a microbatch is too large for it.

    Args:
        largest: samples that fit.
        spared: so many microbatches pass before the first one fails.
        error: what is raised.
    """

    def __init__(self, largest: int, spared: int = 0, error: Exception | None = None):
        self.largest, self.spared, self.sizes = largest, spared, []
        self.error = error or torch.OutOfMemoryError(OOM)

    def on(self, model: torch.nn.Module) -> torch.nn.Module:
        model.model.register_forward_pre_hook(self._check, with_kwargs=True)
        return model

    def _check(self, module, args, kwargs):
        if module.training:
            return
        size = len(kwargs["input_ids"])
        self.sizes.append(size)
        if size > self.largest and len(self.sizes) > self.spared:
            raise self.error


def fit(model, microbatch: int = BATCH_SIZE, auto: bool = True) -> tuple:
    """Train a batch after an assessment of three; what it led to."""
    apex, batches = APEX(stages=1, assessment={"tokens": 3 * BATCH_SIZE * 8}), Batches()
    trainer = make_trainer(
        apex, model=model, microbatch=microbatch, callbacks=(batches,), max_duration="1ba"
    )
    trainer.state.auto_microbatching = auto  # Composer accepts `auto` on a GPU only
    try:
        trainer.fit()
    finally:
        trainer.close()
    weights = trainer.state.model.model.state_dict()
    return apex.history, batches.ids, trainer.state.device_train_microbatch_size, weights


@pytest.mark.parametrize(("largest", "spared"), [(2, 0), (1, 1)], ids=["at once", "within a batch"])
def test_a_batch_is_tried_again_in_halves_and_counts_once(largest, spared):
    memory = SmallMemory(largest, spared)
    # With one microbatch spared, the second one of the batch is the first to fail.
    start = BATCH_SIZE // 2 if spared and largest == 1 else BATCH_SIZE
    with pytest.warns(RuntimeWarning, match="microbatch size will be decreased"):
        found = fit(memory.on(tiny_llama()), microbatch=start)
    history, ids, size, weights = found
    expected, expected_ids, _, expected_weights = fit(tiny_llama(), microbatch=largest, auto=False)
    assert max(memory.sizes) == start and size == largest
    assert history == expected and history[0]["samples"] == 3 * BATCH_SIZE
    assert ids == expected_ids
    assert_same_weights(weights, expected_weights)


def test_a_single_sample_that_does_not_fit_is_composers_error():
    with (
        pytest.warns(RuntimeWarning, match="decreased from 2 -> 1"),
        pytest.raises(RuntimeError, match="microbatch of size 1.*even 1 sample"),
    ):
        fit(SmallMemory(0).on(tiny_llama()))


@pytest.mark.parametrize(
    ("auto", "error"), [(False, None), (True, RuntimeError("no luck")), (True, KeyError("no luck"))]
)
def test_what_is_no_such_case_is_not_tried_again(auto, error):
    memory = SmallMemory(0, error=error)
    with pytest.raises(type(memory.error), match="out of memory|no luck"):
        fit(memory.on(tiny_llama()), auto=auto)
    assert memory.sizes == [BATCH_SIZE]


class OutOfMemoryOnce(Callback):
    """Fails the second batch after a forward pass, as a GPU out of memory would."""

    def __init__(self, where: str):
        self.where, self.raised = where, False

    def _fail(self, state, where):
        if where == self.where and state.timestamp.batch.value == 1 and not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory. (test)")

    def after_forward(self, state, logger):
        self._fail(state, "after_forward")

    def after_backward(self, state, logger):
        self._fail(state, "after_backward")


@pytest.mark.numeric
@pytest.mark.parametrize("where", ["after_forward", "after_backward"])
def test_an_out_of_memory_retry_counts_once(where):
    exact = lambda: {"model": tiny_llama(dtype=torch.float64), "lr": 0.0}  # noqa: E731
    reference, _, _ = run(APEX(stages=1), **exact(), microbatch=2)
    apex, oom = APEX(stages=1), OutOfMemoryOnce(where)
    trainer = make_trainer(apex, **exact(), callbacks=(oom,))
    trainer.state.auto_microbatching = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit()
    assert oom.raised and trainer.state.device_train_microbatch_size == BATCH_SIZE // 2
    assert_same_scores(final_scores(apex), final_scores(reference))
    trainer.close()


def test_all_ranks_try_again_when_one_runs_out_of_memory(tmp_path):
    """Also within a forward pass of FSDP, where the others wait for its part of the weights."""
    run_script(WORKER, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for mode in ("ddp", "fsdp1"):
        expected = ranks[0][f"{mode}-None"]["record"]
        for ends in ranks:
            assert ends[f"{mode}-1"] == {"size": 1, "record": expected}
            assert ends[f"{mode}-None"]["record"] == expected
