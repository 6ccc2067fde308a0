import traceback

import numpy
import pytest
import torch
from composer import Callback, Evaluator
from composer.algorithms import GradientClipping
from composer_run import (
    BATCH_SIZE,
    StopAt,
    assert_same_scores,
    assert_same_weights,
    final_scores,
    make_trainer,
    run,
)
from helpers import (
    CHANGE_BOUND,
    SMOOTH_EPS,
    TokenDataset,
    change_error,
    tiny_llama,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from apex_composer import APEX


def exact(**options) -> dict:
    """Options of a run that scores in float64 and, without a learning rate, the same weights."""
    return {"model": tiny_llama(dtype=torch.float64), "lr": 0.0, **options}


def test_stages_fuse_reselect_and_log():
    apex, _, log = run(APEX(stages=3, threshold=0.25, log_interval=2))
    assert [r["start_batch"] for r in apex.history] == [0, 2, 4]
    assert [r["samples"] for r in apex.history] == [BATCH_SIZE, 2 * BATCH_SIZE, 2 * BATCH_SIZE]
    assert apex._expander.operators == []
    values = {name: [float(v) for _, v in data] for name, data in log.data.items()}
    assert sorted(set(values["apex/stage"])) == [0, 1, 2]
    assert len(values["apex/milliseconds_per_step"]) == 3
    assert all(v > 0 for v in values["apex/milliseconds_per_step"])
    assert all(v > 0 for v in values["apex/operator_norm/q_proj"])
    assert all(0 <= v <= 1 for v in values["apex/overlap/advantageous/channel"])
    layer = "apex/norm_std/model.model.layers.{}.mlp.channels"
    means = [sum(pair) / 2 for pair in zip(*(values[layer.format(i)] for i in (0, 1)), strict=True)]
    assert values["apex/norm_std_mean/channel"] == pytest.approx(means)
    assert len(means) == 4  # three stages' starts and the end of the last


def test_uneven_stages_and_a_plain_one():
    stages = ["1ba", {"duration": "3ba", "expansion": False}, "2ba"]
    seen = []

    class Operators(Callback):
        def batch_start(self, state, logger):
            seen.append(len(apex._expander.operators))

    apex = APEX(stages=stages)
    run(apex, callbacks=(Operators(),))
    assert [r["start_batch"] for r in apex.history] == [0, 1, 4]
    assert seen == [14, 0, 0, 0, 14, 14]


@pytest.mark.numeric
def test_a_plain_run_equals_one_without_apex():
    _, vanilla, _ = run()
    _, plain, _ = run(APEX(expansion=False))
    _, expanded, _ = run(APEX())
    assert_same_weights(vanilla, plain)
    assert any(not torch.equal(weight, expanded[name]) for name, weight in vanilla.items())


@pytest.mark.numeric
def test_microbatches_evaluation_and_checkpointing_do_not_change_scores():
    reference, _, _ = run(APEX(stages=1), **exact())
    micro, _, _ = run(APEX(stages=1), **exact(microbatch=1))
    evaluator = Evaluator(
        label="eval", dataloader=DataLoader(TokenDataset(8, seed=9), batch_size=4)
    )
    evaluated, _, _ = run(APEX(stages=1), **exact(eval_dataloader=evaluator, eval_interval="1ba"))
    for use_reentrant in (True, False):
        options = exact()
        options["model"].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        recomputed, _, _ = run(APEX(stages=1), **options)
        assert_same_scores(final_scores(recomputed), final_scores(reference))
    assert_same_scores(final_scores(micro), final_scores(reference))
    assert_same_scores(final_scores(evaluated), final_scores(reference))
    assert all(s[2] == 6 * BATCH_SIZE for s in final_scores(reference).values())


@pytest.mark.numeric
def test_padding_does_not_count():
    loader = lambda padded: DataLoader(  # noqa: E731
        TokenDataset(24, padded=padded), batch_size=BATCH_SIZE
    )
    options = exact(loader=loader(True), max_duration="1ba")
    apex, _, _ = run(APEX(stages=1, expansion=False), **options)
    model, dataset = exact()["model"], TokenDataset(BATCH_SIZE, padded=True)
    found = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    with torch.no_grad():
        model(input_ids=dataset.ids, attention_mask=dataset.mask)
    norms = [(found[0][i, : int(dataset.mask[i].sum())] ** 2).sum(0).sqrt() for i in range(4)]
    _, sums, samples = final_scores(apex)["model.model.layers.1.mlp.channels"]
    torch.testing.assert_close(sums, torch.stack(norms).sum(0), rtol=1e-11, atol=0)
    assert samples == BATCH_SIZE


def test_an_interval_longer_than_a_stage_still_scores_its_first_batch():
    apex, _, _ = run(APEX(stages=3, assessment={"interval": 100}))
    assert [r["samples"] for r in apex.history] == [BATCH_SIZE] * 3


def test_a_further_fit_may_not_change_the_stages():
    trainer = make_trainer(APEX(stages=3))
    trainer.fit()
    with pytest.raises(ValueError, match="stages: this run was laid out as .*'6ba'.*'9ba'"):
        trainer.fit(duration="3ba")
    trainer.close()


def test_interval_scores_every_kth_batch():
    apex, _, _ = run(APEX(stages=1, assessment={"interval": 4}))
    assert all(s[2] == 2 * BATCH_SIZE for s in final_scores(apex).values())


@pytest.mark.numeric
def test_clipping_acts_on_the_effective_gradient_in_any_order():
    clip = GradientClipping("norm", 0.01)
    _, first, _ = run(APEX(), clip)
    _, last, _ = run(clip, APEX())
    assert_same_weights(first, last)


@pytest.mark.numeric
def test_a_second_fit_goes_on():
    whole, expected, _ = run(APEX(stages=["3ba", "3ba"]))
    apex = APEX(stages=["3ba", "3ba"])
    trainer = make_trainer(apex, callbacks=(StopAt(4),))
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 4
    trainer.state.max_duration = "6ba"
    trainer.fit()
    assert apex.history == whole.history
    assert_same_weights(expected, trainer.state.model.model.state_dict())
    trainer.close()


def test_settings_are_checked_at_construction():
    for settings, message in (
        ({"threshold": 0.6}, "threshold: got 0.6"),
        ({"stages": 0}, "stages: got 0"),
        ({"stages": ["10min"]}, "stages: got '10min'"),
        ({"targets": ["heads"]}, "targets: got 'heads'.*Did you mean 'head'"),
        ({"targets": []}, "targets"),
        ({"kv_heads": "all"}, "kv_heads: got 'all'"),
        ({"assessment": {"method": "ranks"}}, "Did you mean 'rank'"),
        ({"assessment": {"tokens": 0}}, "tokens: got 0"),
        ({"assessment": 3}, "assessment: got 3"),
        ({"assessment": False}, "assessment: got False"),
        ({"expansion": "no"}, "expansion: got 'no'"),
        ({"operator_lr_scale": 0}, "operator_lr_scale"),
        ({"operator_lr_scale": float("inf")}, "operator_lr_scale: got inf"),
        ({"log_interval": 0}, "log_interval"),
        ({"fused_swiglu": 0}, "fused_swiglu: got 0, allowed: True, False, auto"),
        ({"fused_swiglu": 1}, "fused_swiglu: got 1"),
        ({"fused_swiglu": "yes"}, "fused_swiglu: got 'yes', allowed: True, False, auto"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', allowed: auto, torch, triton"),
        ({"seed": -1}, "seed: got -1, allowed: an integer of 0 or more"),
        ({"seed": "a"}, "seed: got 'a'"),
        ({"seed": 2.5}, "seed: got 2.5"),
        ({"seed": True}, "seed: got True"),
        ({"stages": ["0.5dur", "0.6dur"]}, "stages: the shares of training add up to 1.1dur"),
    ):
        with pytest.raises(ValueError, match=message):
            APEX(**settings)
    checked = APEX(threshold=numpy.float32(0.25), seed=numpy.int64(3), stages=numpy.int64(2))
    assert [type(value) for value in (checked.threshold, checked.seed, checked.stages)] == [
        float,
        int,
        int,
    ]
    with pytest.raises(TypeError, match="unknown key 'treshold'. Did you mean 'threshold'"):
        APEX(treshold=0.1)
    with pytest.raises(TypeError, match="assessment: unknown key 'token'. Did you mean 'tokens'"):
        APEX(assessment={"token": 3})


def test_targets_limit_what_is_expanded():
    apex, _, _ = run(APEX(targets=["channel"]), max_duration="3ba")
    names = {name.rsplit(".", 1)[-1] for name in apex.history[0]["advantageous"]}
    assert names == {"channels"}


@pytest.mark.numeric
def test_kernels_train_as_torch_does():
    options = {"max_duration": "4ba", "eps": SMOOTH_EPS}
    models = [tiny_llama(layers=1) for _ in range(3)]
    _, expected, _ = run(APEX(stages=2, implementation="torch"), model=models[0], **options)
    settings = {"stages": 2, "implementation": "triton", "fused_swiglu": True}
    apex, weights, _ = run(APEX(**settings), model=models[1], **options)
    for name, start in models[2].state_dict().items():
        assert change_error(weights[name], expected[name], start) < CHANGE_BOUND, name
    assert apex._swiglu.modules == {}  # the trainer has closed


class HostReads(TorchDispatchMode):
    """Notes who makes the host wait for the device: item(), bool(), cpu() and their like."""

    def __init__(self):
        super().__init__()
        self.callers = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        to_host = "_to_copy" in str(function) and "device" in options
        if "_local_scalar_dense" in str(function) or to_host:
            # Inside the optimizer's step everything is called by way of us: who calls torch?
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            if "apex_composer/" in frames[-1].filename:
                self.callers.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return function(*arguments, **options)


class ReadsWithinBatches(Callback):
    """Watches the first batches from BEFORE_FORWARD to BATCH_END."""

    def __init__(self, batches: int):
        self.reads, self.batches, self.on = HostReads(), batches, False

    def before_forward(self, state, logger):
        if state.timestamp.batch.value < self.batches and not self.on:
            self.on = True
            self.reads.__enter__()

    def batch_end(self, state, logger):
        if self.on:
            self.on = False
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_nothing_waits_for_the_device_within_a_batch(implementation):
    watch = ReadsWithinBatches(batches=2)  # the third ends the stage
    apex = APEX(stages=1, implementation=implementation, log_interval=100)
    model = tiny_llama(layers=1)
    run(apex, model=model, callbacks=(watch,), max_duration="3ba", microbatch=2)
    assert watch.reads.callers == []


@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_nothing_waits_for_the_device_where_rows_are_trained(clipping):
    watch = ReadsWithinBatches(batches=2)
    share = {"trainable": "half", "trainable_share": 0.84}
    apex = APEX(stages=1, threshold=0.25, log_interval=100, **share)
    clip = GradientClipping(clipping, 0.1)
    run(clip, apex, callbacks=(watch,), max_duration="3ba", microbatch=2)
    assert watch.reads.callers == []


def test_waiting_would_be_noticed(monkeypatch):
    from apex_composer.assessment.collector import Assessment

    whole = Assessment.close
    monkeypatch.setattr(Assessment, "close", lambda self: (whole(self), read_from_the_package()))
    watch = ReadsWithinBatches(batches=2)
    run(APEX(stages=1, log_interval=100), callbacks=(watch,), max_duration="3ba", microbatch=2)
    assert len(watch.reads.callers) == 4  # two batches of two microbatches


def read_from_the_package():
    """Reads a tensor in a frame that counts as the package's."""
    exec(compile("torch.ones(1).item()", "apex_composer/probe.py", "exec"), {"torch": torch})
