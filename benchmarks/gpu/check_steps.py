"""Whole steps of a small Llama: kernels train as torch does, and never make the host wait."""

from argparse import Namespace
from collections.abc import Iterable, Iterator

import torch
from arms import ARMS, Training, build_model
from checks import Check, Finding, relative_error
from torch import Tensor
from waits import Waits, count_waits

from apex_composer import Expander, FusedSwiGLU, find_sites

FULL = {
    "layers": 4, "hidden": 512, "channels": 1408, "heads": 8, "kv_heads": 8,
    "vocabulary": 1024, "length": 256,
}  # fmt: skip
SMALL = {
    "layers": 1, "hidden": 32, "channels": 24, "heads": 8, "kv_heads": 8,
    "vocabulary": 64, "length": 8,
}  # fmt: skip
# Of what training changed. AdamW divides by the size of a gradient, so that where gradients are
# next to nothing their rounding decides; without its gradient, an operator would not change at all.
_WEIGHTS_BOUND, _OPERATORS_BOUND = 1e-3, 1e-2
# A norm that is next to equal to another may be ranked the other way round.
_SCORES_BOUND = 1e-2


def checks(device: torch.device, *, small: bool = False) -> Iterator[Check]:
    """Scores, training and waiting."""
    sizes = Namespace(**(SMALL if small else FULL))
    yield Check("scores of an assessment", lambda: list(_check_scores(sizes, device)))
    yield Check("training by kernels", lambda: list(_check_training(sizes, device)))
    yield Check("the host never waits", lambda: list(_check_waits(sizes, device)))


def _ids(sizes: Namespace, sequences: int, device: torch.device, seed: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, sizes.length)
    return torch.randint(0, sizes.vocabulary, shape, generator=generator).to(device)


def _check_scores(sizes: Namespace, device: torch.device) -> Iterator[Finding]:
    """The same forward passes, counted by torch, by the norm kernels, and by SwiGLU itself."""
    model, ids = build_model(sizes, device, "eager"), _ids(sizes, 4, device)
    totals = {}
    for name, implementation, fused in [
        ("torch", "torch", False), ("kernels", "triton", False), ("fused", "triton", True),
    ]:  # fmt: skip
        expander = Expander(find_sites(model), threshold=0.125, implementation=implementation)
        swiglu = FusedSwiGLU(model, fused, collector=expander.assessment.reserve_norms)
        with torch.no_grad(), expander.assessing():
            model(input_ids=ids)
            model(input_ids=ids.flip(0))
        totals[name] = expander.assessment.totals()
        swiglu.remove()
        expander.remove()
    for name in ("kernels", "fused"):
        pairs = [(totals[name][group], total) for group, total in totals["torch"].items()]
        wrong = [(own.scores != other.scores).double().mean() for own, other in pairs]
        yield Finding(f"{name}: scores that differ", float(max(wrong)), _SCORES_BOUND)
        errors = [relative_error(own.norm_sums, other.norm_sums) for own, other in pairs]
        yield Finding(f"{name}: sums of norms", max(errors), 1e-5)


def _check_training(sizes: Namespace, device: torch.device) -> Iterator[Finding]:
    """Three steps from the same weights on the same data, in float32.

    The model does without TF32, which would turn a last bit that differs into 1,000 of them; the
    steps of APEX are taken where it is allowed.
    """
    trained = {name: _train(name, sizes, device) for name in ARMS if name.startswith("apex")}
    start, weights, factors = trained["apex_torch"]
    for name in ("apex_kernels", "apex_kernels_fused"):
        changed, expected = (own.double() - start.double() for own in (trained[name][1], weights))
        yield Finding(f"{name}: weights", relative_error(changed, expected), _WEIGHTS_BOUND)
        error = relative_error(trained[name][2], factors.double())
        yield Finding(f"{name}: operators", error, _OPERATORS_BOUND)


def _train(name: str, sizes: Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All weights before and after, and the operators' left factors, which start at zero."""
    model = build_model(sizes, device, "eager")
    before = _together(model.parameters())
    training = Training(model, device, microbatch=2, precision="fp32", lr=1e-3)
    with training.running(ARMS[name], _ids(sizes, 4, device)) as (step, expander):
        for seed in range(3):
            step(_ids(sizes, 4, device, seed))
        factors = _together(operator.factors.left for operator in expander.operators)
    return before, _together(model.parameters()), factors


def _together(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _check_waits(sizes: Namespace, device: torch.device) -> Iterator[Finding]:
    """A step of APEX waits no more often than one of its vanilla arm, which waits by itself."""
    model, ids = build_model(sizes, device, "sdpa"), _ids(sizes, 4, device)
    # The interpreter cannot round to bfloat16, and compiles nothing.
    precision, warmup = ("bf16", 3) if device.type == "cuda" else ("fp32", 1)
    training = Training(model, device, microbatch=2, precision=precision)
    found: dict[str, Waits] = {}
    for name, arm in ARMS.items():
        with training.running(arm, ids) as (step, _):
            found[name] = count_waits(lambda step=step: step(ids), device, warmup)
    for name in ("apex_torch", "apex_kernels", "apex_kernels_fused"):
        own, base = found[name], found[ARMS[name].base]
        lines = ", ".join(sorted(set(own.told) - set(base.told)))
        label = f"{name}: waits more than vanilla ({len(base.told)})"
        extra = len(own.told) - len(base.told)
        yield Finding(f"{label} {lines}".strip(), max(extra, 0), 0.0)
        if own.profiled is not None and base.profiled is not None:
            extra = own.profiled - base.profiled
            yield Finding(f"{name}: calls that wait, by profile", max(extra, 0), 0.0)
