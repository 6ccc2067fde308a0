"""The executors of kernels against the operators one by one, and which of them is taken."""

import logging

import pytest
import torch
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, tiny_llama, tiny_qwen, tokens

from apex_composer import Expander, find_sites, ops
from apex_composer.assessment import Assessment

CPU = torch.device("cpu")


def trained(make_model, implementation: str, steps: int = 2, **settings):
    """A model after some steps of a stage, and its expander."""
    model = make_model()
    expander = Expander(
        find_sites(model), threshold=0.25, kv_heads="expand", implementation=implementation,
        **settings,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=SMOOTH_EPS, weight_decay=0.1)
    with expander.assessing():
        model(tokens(samples=3, length=12, seed=99))
    expander.begin_stage()
    expander.attach(optimizer)
    for batch in (tokens(samples=3, length=12, seed=seed) for seed in range(steps)):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model, expander


@pytest.mark.parametrize(
    "make_model", [tiny_llama, pytest.param(tiny_qwen, marks=pytest.mark.numeric)]
)
def test_kernels_train_as_torch_does(make_model):
    start, fresh = trained(make_model, "torch", steps=0)
    expected, by_torch = trained(make_model, "torch")
    model, by_triton = trained(make_model, "triton")
    assert len(by_triton.executors) < len(by_torch.executors)
    before, after = dict(start.named_parameters()), dict(expected.named_parameters())
    for name, weight in model.named_parameters():
        assert change_error(weight, after[name], before[name]) < CHANGE_BOUND, name
    for one, other, first in zip(
        by_triton.operators, by_torch.operators, fresh.operators, strict=True
    ):
        for tensors in zip(one.factors, other.factors, first.factors, strict=True):
            assert change_error(*tensors) < CHANGE_BOUND, one.site.name


def test_unfolding_takes_away_what_folding_added():
    _, expander = trained(tiny_llama, "triton", steps=1)
    weights = [site.weight.detach().clone() for site in expander.sites]
    for executor in expander.executors:
        executor.unfold()
    assert not expander.folded
    assert any(not torch.equal(s.weight, w) for s, w in zip(expander.sites, weights, strict=True))
    expander.ensure_folded()
    for site, weight in zip(expander.sites, weights, strict=True):
        # W + d - d + d for numbers below 1: each sum rounds by 6e-8 at most.
        torch.testing.assert_close(site.weight, weight, rtol=0, atol=2e-7)


def test_weights_without_a_gradient_leave_their_factors_alone():
    model, expander = trained(tiny_llama, "triton", steps=1)
    for parameter in model.parameters():
        parameter.grad = None
    expander.sites[0].weight.grad = torch.ones_like(expander.sites[0].weight)
    for executor in expander.executors:
        executor.map_gradient()
    present = [o.site.name for o in expander.operators if o.factors.left.grad is not None]
    assert present == [expander.sites[0].name]


@pytest.mark.numeric
def test_scores_of_kernels_are_those_of_torch():
    model = tiny_llama(heads=4, channels=24)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:] = False
    totals = []
    for implementation in ("torch", "triton"):
        groups = {s.group.name: s.group for s in find_sites(model) if s.group.unit != "kv_head"}
        counts = [(group, max(1, group.units // 4)) for group in groups.values()]
        assessment = Assessment(counts, implementation=implementation)
        with assessment.assessing(mask):
            model(tokens(samples=3, length=12), attention_mask=mask)
        totals.append(assessment.totals())
        assessment.remove()
    for name, expected in totals[0].items():
        # Where a rank is decided, the two norms differ by a thousandth or more: rounding cannot.
        assert torch.equal(totals[1][name].scores, expected.scores)
        # Sums of 12 x 8 positive numbers at most, each sum rounded to 6e-8 of itself.
        torch.testing.assert_close(totals[1][name].norm_sums, expected.norm_sums, rtol=1e-5, atol=0)


def test_the_choice_is_made_by_device_and_dtype_and_said_once(monkeypatch, caplog):
    ops.resolve.cache_clear()
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        "apex_composer.triton_kernels.availability.torch.cuda.is_available", lambda: True
    )
    monkeypatch.setattr(
        "apex_composer.triton_kernels.availability.torch.cuda.get_device_capability",
        lambda device: (9, 0),
    )
    with caplog.at_level(logging.INFO, "apex_composer.ops"):
        assert ops.resolve("auto", cuda) == "triton"
        assert ops.resolve("auto", cuda) == "triton"
        assert ops.resolve("auto", CPU) == "torch"
        assert ops.resolve("torch", cuda) == "torch"
        assert ops.resolve("auto", cuda, torch.float64) == "torch"
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "apex: triton on cuda", "apex: torch on cpu", "apex: torch on cuda",
    ]  # fmt: skip
    ops.resolve.cache_clear()


def test_a_kernel_that_is_asked_for_and_cannot_run_is_an_error(monkeypatch):
    ops.resolve.cache_clear()
    with pytest.raises(ValueError, match="implementation: got triton, but .* float64"):
        ops.resolve("triton", CPU, torch.float64)
    monkeypatch.setattr(
        "apex_composer.triton_kernels.availability.torch.cuda.is_available", lambda: False
    )
    with pytest.raises(ValueError, match="got triton, but no CUDA device.*torch, auto"):
        ops.resolve("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="implementation: got 'cuda', allowed: auto, torch"):
        ops.resolve("cuda", CPU)
    ops.resolve.cache_clear()
