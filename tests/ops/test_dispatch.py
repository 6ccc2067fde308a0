"""Which implementation is taken, and what is said of it."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import linear_site

from apex_composer import Expander
from apex_composer.ops import dispatch as ops
from apex_composer.ops import reference
from apex_composer.ops.monarch import factor_pair
from apex_composer.triton_kernels import tiles
from apex_composer.triton_kernels.availability import interpreted

NAN = float("nan")
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


@pytest.mark.numeric
def test_norms_are_those_of_the_reference_whoever_computes_them():
    device = torch.device("cpu" if interpreted() else "cuda")
    activation = torch.randn(3, 12, 8, device=device)
    mask = torch.ones(3, 12, dtype=torch.bool, device=device)
    mask[1, 7:] = False
    expected = reference.unit_square_sums(activation, 2, mask)
    for implementation in ("torch", "triton"):
        # Without a sample axis there is no kernel: torch computes them, and nothing is refused.
        for given in (activation, activation[mask]):
            out = torch.full((3, 4), NAN, device=device)
            ops.unit_square_sums(given, 2, mask, out=out, implementation=implementation)
            torch.testing.assert_close(out, expected)
