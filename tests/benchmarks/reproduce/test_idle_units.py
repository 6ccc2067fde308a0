"""A base with units that masking does not miss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reproduce import bases, idle_units
from reproduce.model import BatchOrder, build_model, make_optimizer, train
from reproduce.scales import SCALES
from reproduce.stage_facts import assess_units
from reproduce.texts import load, prepare_small

from apex_composer.observe.masking import choose_all_masked, masked

SCALE = replace(SCALES["smoke"], base_batches=96)
CPU = torch.device("cpu")
VOCABULARY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    prepare_small(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """The base `mixture`, and what it became with idle units."""
    texts = load(folder / "texts")
    return [bases.get_base(name, SCALE, texts, folder, CPU) for name in ("mixture", "superfluous")]


def small():
    """A model, its optimizer and batches of random tokens."""
    model = build_model(SCALE.sizes, VOCABULARY, CPU, 0)
    size = (64, SCALE.sizes.length + 1)
    windows = {"words": np.random.default_rng(0).integers(0, VOCABULARY, size).astype(np.uint16)}
    return model, make_optimizer(model), BatchOrder(windows, SCALE.batch, 1, CPU)


@torch.no_grad()
def test_masking_idle_units_changes_a_twentieth_of_what_it_did():
    model, _, order = small()
    batches = [order.batch(0)]
    groups, totals, _ = assess_units(model, batches)
    hidden = choose_all_masked(groups, totals, "lowest", 0.125)

    def change() -> float:
        whole = model(input_ids=batches[0]).logits
        with masked(groups, hidden):
            return float((model(input_ids=batches[0]).logits - whole).norm())

    before = change()
    idle_units.make_idle(model, batches, 0.125)
    assert 0 < change() < before / 20


def test_it_goes_on_from_mixture_with_its_moments(pair):
    mixture, idle = pair
    assert (mixture.batches, idle.batches) == (96, 108)
    steps = [base.optimizer["state"][0]["step"] for base in pair]
    assert [float(step) for step in steps] == [96, 108]
    assert mixture.hash != idle.hash


def test_every_unit_that_is_held_stays_as_it_was_and_no_other():
    model, optimizer, order = small()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    hold = idle_units.make_idle(model, [order.batch(0)], 0.125)
    made = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.register_step_post_hook(lambda *_: hold())
    train(model, optimizer, order, range(4), lambda _: 1e-2)
    after = dict(model.named_parameters())
    for layer in range(SCALE.sizes.layers):
        for block, outputs, rows, columns in (
            ("self_attn", "v_proj", ("q_proj", "k_proj", "v_proj"), "o_proj"),
            ("mlp", "up_proj", ("gate_proj", "up_proj"), "down_proj"),
        ):
            start = f"model.layers.{layer}.{block}."
            name = f"{start}{outputs}.weight"
            changed = (made[name] != before[name]).any(1)
            assert changed.sum() == (6 if block == "mlp" else 4)  # a head of 4, and 6 of 48
            assert torch.equal(made[name][changed], idle_units.SIZE * before[name][changed])
            for row in rows:
                same = (after[f"{start}{row}.weight"] == made[f"{start}{row}.weight"]).all(1)
                assert torch.equal(same, changed)
            same = after[f"{start}{columns}.weight"] == made[f"{start}{columns}.weight"]
            assert torch.equal(same.all(0), changed)


def test_the_weakest_by_norm_are_chosen():
    """Channel 5 and head 2 hand on least."""
    model, _, order = small()
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[5] *= 0.1
        layer.self_attn.v_proj.weight[8:12] *= 0.1
    made = layer.mlp.up_proj.weight.detach().clone(), layer.self_attn.v_proj.weight.detach().clone()
    idle_units.make_idle(model, [order.batch(0)], 0.125)
    assert not torch.equal(layer.mlp.up_proj.weight[5], made[0][5])
    changed = (layer.self_attn.v_proj.weight != made[1]).any(1).nonzero().flatten()
    assert changed.tolist() == [8, 9, 10, 11]


def test_heads_that_share_a_kv_head_are_refused():
    model = build_model(replace(SCALE.sizes, kv_heads=2), VOCABULARY, CPU, 0)
    with pytest.raises(ValueError, match="8 heads share 2 KV heads"):
        idle_units.make_idle(model, [small()[2].batch(0)], 0.125)


def test_a_killed_one_goes_on_to_the_same_base(folder, pair, tmp_path, monkeypatch):
    texts = load(folder / "texts")
    monkeypatch.setattr(bases, "_STRETCH", 5)
    monkeypatch.setattr(bases, "_SECONDS", 0.0)
    (mixture,) = folder.glob("mixture-*.pt")
    (tmp_path / mixture.name).write_bytes(mixture.read_bytes())
    trained, calls = bases.train, []

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*arguments, **settings)

    monkeypatch.setattr(bases, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        bases.get_base("superfluous", SCALE, texts, tmp_path, CPU)
    assert bases.get_base("superfluous", SCALE, texts, tmp_path, CPU).hash == pair[1].hash


def test_the_files_of_the_other_bases_keep_their_names():
    """They have taken 45 minutes each."""
    assert repr(bases.KINDS["context"]) == (
        "Kind(domains=None, continued=None, length=0.5, batches=1.0)"
    )


def test_the_rate_stays_where_it_ended():
    rates = [bases.base_rate(SCALES["cpu"], 24_000, place) for place in (24_000, 24_001, 27_000)]
    assert rates == pytest.approx([4e-4] * 3, rel=1e-12)
