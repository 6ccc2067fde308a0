"""The executors of kernels against the operators one by one, and which of them is taken."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CHANGE_BOUND,
    SMOOTH_EPS,
    change_error,
    linear_site,
    tiny_llama,
    tiny_qwen,
    tokens,
)

from apex_composer import Expander, find_sites
from apex_composer.assessment.collector import Assessment
from apex_composer.ops import dispatch as ops
from apex_composer.ops.monarch import factor_pair
from apex_composer.triton_kernels import tiles

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to have an RTX 3090; what is resolved meanwhile is forgotten."""
    properties = SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    forget()
    yield
    forget()


def forget() -> None:
    ops.resolve.cache_clear()
    ops.resolve_monarch.cache_clear()


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


def test_memory_of_weights_and_biases_may_be_replaced():
    """As loading a checkpoint by `parameter.data = ...` does, in the middle of a stage."""
    found = []
    for moved in (False, True):
        model, expander = trained(tiny_qwen, "triton", steps=1)
        for parameter in model.parameters():
            if moved:
                parameter.data = parameter.data.clone()
        for executor in expander.executors:
            executor.unfold()
        base = {name: weight.clone() for name, weight in model.state_dict().items()}
        for executor in expander.executors:
            executor.fold()
        found.append(base | {f"{n} folded": w.clone() for n, w in model.state_dict().items()})
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name


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
    with caplog.at_level(logging.INFO, "apex_composer.ops.dispatch"):
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


def qwen_sites() -> list:
    """Rows like those of Qwen2-7B's gate, and fewer ones: 55 x 155 and 22 x 32 at 0.45."""
    sites = [linear_site(18944, 2, dtype=torch.float32, name="gate")]
    sites.append(linear_site(1565, 2, dtype=torch.float32, name="queries"))
    return [replace(site, group=replace(site.group, name=site.name)) for site in sites]


def test_auto_leaves_blocks_to_torch_that_the_kernels_cannot_take(gpu, caplog):
    """Said before any data are read, once, and for that shape alone."""
    with caplog.at_level(logging.INFO, "apex_composer.ops.dispatch"):
        for _ in range(2):  # Composer builds one at INIT and one at FIT_START
            expander = Expander(qwen_sites(), threshold=0.45, device=CUDA)
    assert [record.message for record in caplog.records] == [
        "apex: triton on cuda:0",
        "apex: torch for operators of 55 x 155 blocks, because the kernels take blocks of up to "
        "128, not 55 x 155",
    ]
    kinds = [factor_pair(expander.counts[site.group.name]) for site in expander.sites]
    assert kinds == [(55, 155), (22, 32)]
    assert [ops.resolve_monarch("auto", CUDA, torch.float32, *pair) for pair in kinds] == [
        "torch",
        "triton",
    ]


def test_triton_refuses_blocks_that_it_cannot_take_when_it_is_asked_for(gpu, monkeypatch):
    message = "got triton, but the kernels take blocks of up to 128, not 55 x 155. Allowed here"
    with pytest.raises(ValueError, match=message):
        Expander(qwen_sites(), threshold=0.45, implementation="triton", device=CUDA)
    # Without operators there are no blocks.
    Expander(qwen_sites(), threshold=0.45, implementation="triton", device=CUDA, expansion=False)
    forget()
    monkeypatch.setattr(tiles, "shared_memory", lambda p, q: 147_456)
    message = "blocks of 22 x 32 need 147,456 bytes of shared memory, cuda:0 has 101,376"
    with pytest.raises(ValueError, match=message):
        Expander(qwen_sites()[1:], threshold=0.45, implementation="triton", device=CUDA)


def test_an_expander_refuses_kernels_that_do_not_run_where_the_weights_are():
    with pytest.raises(ValueError, match="got triton, but the kernels do not compute in float64"):
        Expander([linear_site(8, 2)], threshold=0.25, implementation="triton")


def test_some_shapes_by_torch_and_others_by_kernels_train_as_torch_does(monkeypatch):
    start, _ = trained(tiny_llama, "torch", steps=0)
    expected, _ = trained(tiny_llama, "torch")
    # At a quarter of 24 channels n = 6 has blocks of 2 x 3, a head of 8 rows has 2 x 4.
    monkeypatch.setattr(
        "apex_composer.operators.backends.resolve_monarch",
        lambda implementation, device, dtype, p, q: "torch" if (p, q) == (2, 3) else "triton",
    )
    model, expander = trained(tiny_llama, "triton")
    kinds = [type(executor).__name__ for executor in expander.executors]
    assert kinds.count("ExpansionOperator") == 3 * 2 and "KernelExecutor" in kinds
    assert set(expander.relative_norms()) == {site.name for site in expander.sites}
    before, after = dict(start.named_parameters()), dict(expected.named_parameters())
    for name, weight in model.named_parameters():
        assert change_error(weight, after[name], before[name]) < CHANGE_BOUND, name
