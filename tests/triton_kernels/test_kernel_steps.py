"""Whole steps of a small Llama: kernels score and train as torch does, and never make it wait."""

from argparse import Namespace
from collections.abc import Iterable

import pytest
import torch
from arms import ARMS, Training, build_model
from kernel_cases import check_error, on_gpus
from waits import count_waits

from apex_composer import Expander, FusedSwiGLU, find_sites
from apex_composer.triton_kernels.availability import interpreted

SMALL = Namespace(
    layers=1, hidden=32, channels=24, heads=8, kv_heads=8, vocabulary=64, length=8, sequences=2
)
LARGE = Namespace(
    layers=4, hidden=512, channels=1408, heads=8, kv_heads=8, vocabulary=1024, length=256,
    sequences=4,
)  # fmt: skip
small_and_large = pytest.mark.parametrize(
    "sizes", [SMALL, *on_gpus([LARGE])], ids=["small", "large"]
)
APEX_BY_KERNELS = ("apex_kernels", "apex_kernels_fused")
# Of what training changed. AdamW divides by the size of a gradient, so that where gradients are
# next to nothing their rounding decides; without its gradient, an operator would not change at all.
WEIGHTS_BOUND, OPERATORS_BOUND = 1e-3, 1e-2
# A norm that is next to equal to another may be ranked the other way round.
SCORES_BOUND = 1e-2


def token_ids(sizes: Namespace, device: torch.device, seed: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.sequences, sizes.length)
    return torch.randint(0, sizes.vocabulary, shape, generator=generator).to(device)


@pytest.mark.numeric
@small_and_large
def test_scores_are_those_of_torch(sizes, device):
    """The same forward passes, counted by torch, by the norm kernels, and by SwiGLU itself."""
    model, ids = build_model(sizes, device, "eager"), token_ids(sizes, device)
    mask = torch.ones_like(ids)
    mask[1, sizes.length // 2 :] = 0
    totals = []
    for implementation, fused in (("torch", False), ("triton", False), ("triton", True)):
        expander = Expander(find_sites(model), threshold=0.125, implementation=implementation)
        swiglu = FusedSwiGLU(model, fused, collector=expander.assessment.reserve_norms)
        with torch.no_grad(), expander.assessing(mask):
            model(input_ids=ids, attention_mask=mask)
            model(input_ids=ids.flip(0), attention_mask=mask)
        totals.append(expander.assessment.totals())
        swiglu.remove()
        expander.remove()
    for own in totals[1:]:
        for group, expected in totals[0].items():
            found = own[group]
            assert (found.scores != expected.scores).double().mean() <= SCORES_BOUND
            check_error(found.norm_sums, expected.norm_sums.double(), 1e-5)


def together(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def trained(name: str, sizes: Namespace, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What three steps changed of the weights, and the left factors, which start at zero.

    In float32, where the model does without TF32, which would turn a last bit that differs into
    1,000 of them; the steps of APEX are taken where it is allowed.
    """
    model = build_model(sizes, device, "eager")
    before = together(model.parameters())
    training = Training(model, device, microbatch=2, precision="fp32", lr=1e-3)
    with training.running(ARMS[name], token_ids(sizes, device)) as (step, expander):
        for seed in range(3):
            step(token_ids(sizes, device, seed))
        factors = together(operator.factors.left for operator in expander.operators)
    return together(model.parameters()) - before, factors


@pytest.mark.numeric
@small_and_large
def test_kernels_train_as_torch_does(sizes, device):
    weights, factors = trained("apex_torch", sizes, device)
    for name in APEX_BY_KERNELS:
        found = trained(name, sizes, device)
        check_error(found[0], weights, WEIGHTS_BOUND)
        check_error(found[1], factors, OPERATORS_BOUND)


@small_and_large
def test_a_step_waits_no_more_often_than_without_apex(sizes, device):
    """A vanilla step may wait by itself: transformers looks at values."""
    model, ids = build_model(sizes, device, "sdpa"), token_ids(sizes, device)
    # The interpreter cannot round to bfloat16, and compiles nothing.
    precision, warmup = ("fp32", 1) if interpreted() else ("bf16", 3)
    training = Training(model, device, microbatch=2, precision=precision)
    found = {}
    for name, arm in ARMS.items():
        with training.running(arm, ids) as (step, _):
            found[name] = count_waits(lambda step=step: step(ids), device, warmup)
    for name in ("apex_torch", *APEX_BY_KERNELS):
        own, base = found[name], found[ARMS[name].base]
        assert len(own.told) <= len(base.told), (name, sorted(set(own.told) - set(base.told)))
        if own.profiled is not None and base.profiled is not None:
            assert own.profiled <= base.profiled, name


def test_waits_are_counted(device):
    tensor = torch.ones(3, device=device)
    assert not count_waits(lambda: tensor + 1, device, warmup=1).told
    assert count_waits(lambda: tensor.sum().item(), device, warmup=1).told
