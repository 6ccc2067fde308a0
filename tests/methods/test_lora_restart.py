"""A restart changes where the numbers stand, not what the model computes."""

import pytest
import torch
from helpers import TokenDataset, next_token_loss, tiny_llama
from lora_runs import lora_llama, weights
from transformers import GPT2Config, GPT2LMHeadModel

from apex_composer.methods.lora_restart import (
    adapters,
    check_mergeable,
    find_smallest,
    low_rank,
    restart,
)

IDS = TokenDataset(4).ids


def tiny_gpt2() -> GPT2LMHeadModel:
    """Its weights are [inputs, outputs]."""
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).double()


def trained(**changed) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model after two steps, and its optimizer."""
    model = lora_llama(**changed).eval()  # dropout would hide what a restart changes
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, 1e-2, amsgrad=True)
    for _ in range(2):
        optimizer.zero_grad()
        next_token_loss(model, IDS).backward()
        optimizer.step()
    return model, optimizer


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.5, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]},
        {"model": tiny_gpt2(), "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ],
    ids=["lora", "rslora", "patterns", "gpt2"],
)
def test_a_restart_does_not_change_what_the_model_computes(changed):
    model, optimizer = trained(**changed)
    before, computed = weights(model), logits(model)
    restart(model, optimizer, 0.9, 17, 500)
    # Sums of at most 64 terms through some ten layers, in another order, each to 2e-16.
    assert (logits(model) - computed).norm() / computed.norm() < 1e-13
    for name, weight in weights(model).items():
        if "lora_B" in name:
            assert before[name].any() and not weight.any()
        elif "lora_A" in name or "base_layer.weight" in name:
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name
    if "modules_to_save" not in changed:  # which this switches off, too
        with model.disable_adapter():
            computed_alone = logits(model)
        assert (computed_alone - computed).norm() / computed.norm() < 1e-13


def test_the_base_gets_what_the_adapter_added():
    model, optimizer = trained(use_rslora=True)
    before = weights(model)
    added = {name: layer.get_delta_weight(own) for name, layer, own in adapters(model)}
    restart(model, optimizer, 0.9, 17, 500)
    assert len(added) == 14
    for name, change in added.items():
        key = f"{name}.base_layer.weight"
        expected = before[key] + change
        torch.testing.assert_close(weights(model)[key], expected, rtol=0, atol=1e-15)


def test_products_are_of_the_weights_precision():
    left, right = torch.randn(3, 2), torch.randn(2, 5)
    exact = (left.double() @ right.double()) * 0.5
    with torch.autocast("cpu", torch.bfloat16):
        found = low_rank(left, right, 0.5, torch.float32)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < 1e-6
    assert torch.equal(low_rank(left, right, 0.5, torch.float64), exact)


def test_a_new_a_is_drawn_as_pefts_from_seed_batch_and_name():
    def drawn(seed: int, batch: int) -> dict[str, torch.Tensor]:
        model, optimizer = trained()
        torch.manual_seed(seed + batch)  # the global state does not matter, nor does it change
        state = torch.get_rng_state()
        restart(model, optimizer, 0.9, seed, batch)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: own for name, own in weights(model).items() if "lora_A" in name}

    first = drawn(17, 500)
    assert all(torch.equal(own, first[name]) for name, own in drawn(17, 500).items())
    for other in (drawn(17, 1000), drawn(18, 500)):
        assert not any(torch.equal(own, first[name]) for name, own in other.items())
    for own in first.values():
        bound = own.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        assert 0.8 * bound < own.abs().max() <= bound
    assert len({float(own[0, 0]) for own in first.values()}) == len(first)


@pytest.mark.parametrize(("prune", "kept"), [(0.0, 1.0), (0.9, 0.1), (1.0, 0.0)])
def test_the_optimizer_keeps_the_moments_where_the_first_is_largest(prune, kept):
    model, optimizer = trained()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = {id(p): {k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters}
    zeroed = restart(model, optimizer, prune, 17, 500)
    assert zeroed == pytest.approx(1 - kept, abs=0.01)
    for parameter in parameters:
        now, was = optimizer.state[parameter], before[id(parameter)]
        assert torch.equal(now["step"], was["step"])
        stays = now["exp_avg"] != 0
        assert int(stays.sum()) == pytest.approx(kept * stays.numel(), abs=0.5)
        if stays.any() and not stays.all():
            assert was["exp_avg"][stays].abs().min() >= was["exp_avg"][~stays].abs().max()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(now[key][stays], was[key][stays]) and not now[key][~stays].any()


def test_modules_trained_beside_the_adapters_keep_their_moments():
    model, optimizer = trained(modules_to_save=["lm_head"])
    restart(model, optimizer, 1.0, 17, 500)
    (head,) = [p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name]
    assert optimizer.state[head]["exp_avg"].all()


def test_of_equal_numbers_the_first_are_pruned():
    values = torch.tensor([[1.0, -1.0, 1.0], [0.5, -2.0, 1.0]])
    assert find_smallest(values, 0.5).tolist() == [[True, True, False], [True, False, False]]
    assert not find_smallest(values, 0.0).any()


def test_no_step_after_a_restart_is_longer_than_adams_own():
    """Where a first moment stays without its second, A would move by m / eps."""
    model, optimizer = trained()
    for own in optimizer.state.values():  # as of gradients that change their signs
        own["exp_avg"].normal_()
        own["exp_avg_sq"].copy_(own["max_exp_avg_sq"].uniform_())
    restart(model, optimizer, 0.9, 17, 500)
    before = {name: w.clone() for name, w in model.named_parameters() if "lora_A" in name}
    optimizer.zero_grad()
    next_token_loss(model, IDS).backward()  # the gradients of A are 0
    optimizer.step()
    moved = max((w - before[n]).abs().max() for n, w in model.named_parameters() if n in before)
    assert 0 < moved < 100 * optimizer.param_groups[0]["lr"]


def tied() -> torch.nn.Module:
    return lora_llama(
        model=tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"]
    )


def two_adapters() -> torch.nn.Module:
    model = lora_llama()
    model.add_adapter("second", model.peft_config["default"])
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (tiny_llama, "model.peft_config: got none"),
        (lambda: lora_llama(use_dora=True), "use_dora: got true"),
        (lambda: lora_llama(lora_bias=True), "lora_bias: got true"),
        (lambda: lora_llama(target_modules=["embed_tokens"]), "target_modules: got Embedding"),
        (lambda: lora_llama(torch.bfloat16), "master_weights_dtype: got torch.bfloat16"),
        (tied, "weight that another layer uses"),
        (two_adapters, "got the adapters default, second"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        check_mergeable(make())


def test_what_can_be_merged_passes():
    for changed in (
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"modules_to_save": ["lm_head"]},
    ):
        check_mergeable(lora_llama(**changed))
