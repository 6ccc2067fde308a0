"""SwiGLU in one kernel: the same numbers, the same names, and norms on its way."""

import copy
from types import MethodType

import pytest
import torch
from helpers import tiny_llama, tiny_qwen, tokens
from transformers.models.llama.modeling_llama import LlamaMLP

from apex_composer import Expander, FusedSwiGLU, find_sites
from apex_composer.model.fused_swiglu import find_swiglus

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_qwen])
def test_values_gradients_and_names_are_those_of_eager_mode(make_model):
    ids, expected, model = tokens(3, 12), make_model(), make_model()
    names = list(model.state_dict())
    fused = FusedSwiGLU(model, True)
    assert len(fused.modules) == 2 and list(model.state_dict()) == names
    for each in (expected, model):
        each(ids, labels=ids).loss.backward()
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        # float32 rounds to 6e-8, and a matrix of these gradients is what is left of terms a hundred
        # times as large (the queries of the Qwen2), each of them a sum of many.
        error = (weight.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-4, name


def test_removing_it_gives_the_model_back():
    model = tiny_llama()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    fused = FusedSwiGLU(model, True)
    assert "forward" in model.model.layers[0].mlp.__dict__
    fused.remove()
    fused.remove()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_a_collector_takes_over_and_a_second_installation_does_not():
    asked, model, ids = [], tiny_llama(), tokens(1, 4)

    def collector(group, gate):
        asked.append(group)

    first, second = FusedSwiGLU(model, True), FusedSwiGLU(model, True, collector=collector)
    third = FusedSwiGLU(model, True)
    model(ids)
    assert asked == ["model.layers.0.mlp.channels", "model.layers.1.mlp.channels"]
    third.remove()
    first.remove()
    model(ids)
    assert len(asked) == 4
    second.remove()
    assert "forward" not in model.model.layers[0].mlp.__dict__


def counted(model, ids, mask, fused: bool, implementation="triton"):
    """Totals of an assessment, with SwiGLU fused or not, and the calls of norm kernels."""
    expander = Expander(find_sites(model), threshold=0.25, implementation=implementation)
    swiglu = FusedSwiGLU(model, fused, collector=expander.assessment.reserve_norms)
    with expander.assessing(mask):
        model(ids, attention_mask=mask)
        model(ids.flip(0), attention_mask=mask)  # a second microbatch
    totals = expander.assessment.totals()
    swiglu.remove()
    expander.remove()
    return totals


@pytest.mark.parametrize("masked", [False, True])
def test_norms_of_channels_come_from_the_kernel(masked, monkeypatch):
    model, ids = tiny_llama(), tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:] = False
    mask = mask if masked else None
    expected = counted(model, ids, mask, fused=False)
    from apex_composer.assessment import collector as assessment

    widths, whole = [], assessment.unit_square_sums

    def unit_square_sums(activation, *arguments, **names):
        widths.append(activation.shape[-1])
        whole(activation, *arguments, **names)

    monkeypatch.setattr(assessment, "unit_square_sums", unit_square_sums)
    totals = counted(model, ids, mask, fused=True)
    assert set(widths) == {32}  # heads only; the 24 channels were counted by SwiGLU itself
    for name, total in expected.items():
        # As in test_dispatch.py: no ranks that rounding could decide, and sums of positive numbers.
        assert torch.equal(totals[name].scores, total.scores)
        torch.testing.assert_close(totals[name].norm_sums, total.norm_sums, rtol=1e-5, atol=0)


def test_recomputed_and_evaluation_passes_do_not_count():
    ids, totals = tokens(3, 12), []
    for checkpointing in (False, True):
        model = tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        expander = Expander(find_sites(model), threshold=0.25, implementation="triton")
        FusedSwiGLU(model, True, collector=expander.assessment.reserve_norms)
        expander.assessment.open()
        loss = model(ids, labels=ids).loss
        loss.backward()
        expander.assessment.close()
        expander.assessment.commit()
        model(ids)
        totals.append(expander.assessment.totals())
    for name, total in totals[0].items():
        assert totals[1][name].samples == total.samples == 3
        assert torch.equal(totals[1][name].scores, total.scores)


def test_a_copy_of_the_model_computes_by_its_own_weights_and_does_not_count():
    model, ids = tiny_llama(), tokens(3, 12)
    expander = Expander(find_sites(model), threshold=0.25, implementation="triton")
    FusedSwiGLU(model, True, collector=expander.assessment.reserve_norms)
    twin = copy.deepcopy(model.model.layers[0].mlp)
    hidden = torch.randn(2, 5, 32)
    expected = model.model.layers[0].mlp(hidden)
    with torch.no_grad():
        twin.gate_proj.weight.zero_()
    expander.assessment.open()
    assert torch.equal(twin(hidden), torch.zeros_like(expected))
    expander.assessment.discard()
    assert torch.equal(model.model.layers[0].mlp(hidden), expected)
    with expander.assessing():
        model(ids)


def test_auto_leaves_the_cpu_alone_and_true_says_why_it_cannot(monkeypatch):
    model = tiny_llama()
    assert FusedSwiGLU(model, "auto").modules == FusedSwiGLU(model, False).modules == {}
    for wrong in ("yes", 0, 1):
        told = f"fused_swiglu: got {wrong!r}, allowed: True, False, auto"
        with pytest.raises(ValueError, match=told):
            FusedSwiGLU(model, wrong)
    with pytest.raises(ValueError, match="got true, but the model has no modules with gate_proj"):
        FusedSwiGLU(torch.nn.Linear(2, 2), True)
    with pytest.raises(ValueError, match="got true, but .*meta.*Allowed here: false, auto"):
        FusedSwiGLU(model, True, device=torch.device("meta"))


class Scaled(LlamaMLP):
    """As FalconH1's: the same parts, another formula."""

    multiplier = 0.5

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x) * self.multiplier)
        return self.down_proj(self.up_proj(x) * gate)


class Dropped(LlamaMLP):
    """As OpenLlama's."""

    def forward(self, x):
        return self.drop(super().forward(x))


@pytest.mark.parametrize("kind", [Scaled, Dropped])
def test_another_formula_of_the_same_parts_is_left_alone(kind, monkeypatch):
    model, ids = tiny_llama(), tokens(1, 4)
    for layer in model.model.layers:
        layer.mlp.__class__, layer.mlp.drop = kind, torch.nn.Dropout(0.1)
    expected = model.eval()(ids).logits
    assert find_swiglus(model) == {} == FusedSwiGLU(model, "auto").modules
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="got true, but the model has no modules with gate_proj"):
        FusedSwiGLU(model, True)
    monkeypatch.setattr(Scaled, "multiplier", 1.0)  # the formula itself
    assert bool(find_swiglus(model)) is (kind is Scaled)


@pytest.mark.parametrize("collector", [None, lambda *_: None])
def test_a_forward_that_somebody_else_has_replaced_is_left_alone(collector):
    """Device hooks and adapters put theirs on the instance."""
    model, ids = tiny_llama(), tokens(1, 4)
    mlp = model.model.layers[0].mlp
    own = mlp.forward = MethodType(lambda self, x: type(self).forward(self, x) + 1, mlp)
    expected = model(ids).logits
    fused = FusedSwiGLU(model, True, collector=collector)
    assert list(fused.modules) == ["model.layers.1.mlp"] and mlp.forward is own
    torch.testing.assert_close(model(ids).logits, expected)
    fused.remove()
    assert torch.equal(model(ids).logits, expected) and mlp.__dict__["forward"] is own


def test_only_silu_is_found():
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert list(find_swiglus(model)) == ["model.layers.0.mlp"]
