import pytest
import torch
from reproduce.arms import Arm
from reproduce.splitting import split, split_selections, split_similarity, split_sites
from tiny_arms import SCALE, VOCABULARY, in_double, start, train_stage
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, find_sites

ALONE = Arm("split", apex={"expansion": False}, variation={"split": True})


def grouped(kv_heads, setting="auto", bias=False):
    """A float64 Llama with grouped-query attention and an expander whose units are selected."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=kv_heads, attention_bias=bias, mlp_bias=bias,
        use_cache=False,
    )  # fmt: skip
    model = in_double(LlamaForCausalLM(config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads=setting)
    ids = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    with expander.assessing():
        model(input_ids=ids)
    expander.begin_stage()
    return model, expander, ids


@torch.no_grad()
def drop_weak_units(expander):
    """Weak units hand on nothing: their output columns are zero."""
    for site, _, weak in split_sites(expander):
        if site.axis == 1:
            site.weight.index_fill_(1, weak, 0)


@pytest.mark.parametrize("kv_heads, bias", [(8, False), (8, True), (4, False), (2, True)])
def test_a_model_without_its_weak_units_keeps_its_function_exactly(kv_heads, bias):
    model, expander, ids = grouped(kv_heads, "expand", bias)
    drop_weak_units(expander)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model(input_ids=ids).logits.detach()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    split(expander, optimizer, seed=1)
    after = model(input_ids=ids).logits.detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    changed = {
        name.split(".")[-2] for name, value in model.named_parameters()
        if not torch.equal(value, weights[name])
    }  # fmt: skip
    assert changed == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_splitting_again_keeps_the_function_too():
    model, expander, ids = grouped(8)
    optimizer = torch.optim.AdamW(model.parameters())
    split(expander, optimizer, seed=1)
    first = expander.selections
    with expander.assessing():
        model(input_ids=ids)
    expander.begin_stage()
    assert any(not torch.equal(own[1], first[name][1]) for name, own in expander.selections.items())
    drop_weak_units(expander)
    before = model(input_ids=ids).logits.detach()
    split(expander, optimizer, seed=1)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), before, rtol=0, atol=1e-12)


def test_heads_whose_key_heads_are_left_alone_are_left_alone():
    model, expander, _ = grouped(2, "skip")
    assert set(split_selections(expander)) == {
        f"model.layers.{layer}.mlp.channels" for layer in range(2)
    }


def test_query_heads_go_with_their_key_heads():
    _, expander, _ = grouped(4, "expand")
    selections = split_selections(expander)
    layer = "model.layers.0.self_attn"
    pairs = zip(selections[f"{layer}.kv_heads"], selections[f"{layer}.heads"], strict=True)
    for units, heads in pairs:
        assert heads.tolist() == [2 * unit + i for unit in units.tolist() for i in (0, 1)]


def test_rows_are_copied_and_columns_shared_out_unequally():
    model, expander, _ = grouped(8)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    split(expander, torch.optim.AdamW(model.parameters()), seed=1)
    written = {}
    for site, strong, weak in split_sites(expander):
        changed = weak if site.axis == 0 else torch.cat([strong, weak])
        written[site.name] = site.axis, changed
        if site.axis == 0:
            assert torch.equal(site.weight[weak], before[site.name][strong])
            assert torch.equal(site.weight[strong], before[site.name][strong])
        else:
            whole = before[site.name][:, strong]
            shares = site.weight[:, strong] / whole
            assert 0.3 <= shares.min() and shares.max() <= 0.7 and shares.std() > 0.01
            # One share for all numbers of a unit.
            per_unit = shares.unflatten(1, (-1, site.group.unit_size))
            torch.testing.assert_close(per_unit, per_unit[:1, :, :1].expand_as(per_unit))
            torch.testing.assert_close(site.weight[:, strong] + site.weight[:, weak], whole)
    for name, value in model.named_parameters():
        axis, changed = written.get(name, (0, torch.tensor([], dtype=torch.int64)))
        rest = (one.detach().index_fill(axis, changed, 0) for one in (value, before[name]))
        assert torch.equal(*rest)


def test_moments_of_what_changed_begin_again_and_others_stay():
    started = start(ALONE)
    train_stage(started, 0, 2)
    expander = started.varied.expander
    state = started.optimizer.state
    before = {site.name: state[site.weight]["exp_avg_sq"].clone() for site in expander.sites}
    split(expander, started.optimizer, seed=1)
    for site, strong, weak in split_sites(expander):
        moment = state[site.weight]["exp_avg_sq"]
        changed = weak if site.axis == 0 else torch.cat([strong, weak])
        assert not moment.index_select(site.axis, changed).any()
        assert not state[site.weight]["exp_avg"].index_select(site.axis, changed).any()
        kept = torch.ones(moment.shape[site.axis], dtype=torch.bool)
        kept[changed] = False
        kept = kept.nonzero().flatten()
        rest = moment.index_select(site.axis, kept)
        assert rest.any() and torch.equal(rest, before[site.name].index_select(site.axis, kept))


def test_noise_parts_a_copy_from_what_it_was_copied_from_by_its_share():
    model, expander, _ = grouped(8)
    optimizer = torch.optim.AdamW(model.parameters())
    split(expander, optimizer, seed=1)
    assert split_similarity(expander) == pytest.approx(1)
    split(expander, optimizer, seed=1, noise=0.5)
    assert split_similarity(expander) == pytest.approx((1 + 0.25) ** -0.5, abs=0.03)


@pytest.mark.parametrize("apex", [{"expansion": False}, {}], ids=["alone", "with operators"])
def test_a_split_run_says_what_dropping_the_weak_units_costs(apex):
    started = start(Arm("split", apex=apex, variation={"split": True}))
    train_stage(started, 0, 3)
    train_stage(started, 1, 1)
    for begun, ended in zip(started.begun, started.ended, strict=True):
        before, after = begun["split_losses"]["before"], begun["split_losses"]["after"]
        assert before != after and abs(after - before) < 1
        assert -1 <= ended["split_similarity"] <= 1
        assert ("relative_norm" in ended) == (apex == {})
    assert started.ended[0]["split_similarity"] > 0.5
    assert SCALE.probe_windows == 2  # batches that the losses are of
