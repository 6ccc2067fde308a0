import json

import pytest
import torch
from reproduce.arms import Arm
from reproduce.authors import PIECES
from tiny_arms import equal, run, start, train_stage

from apex_composer.report.read_metrics import flatten

PLAIN = Arm("apex_rank", apex={})


@pytest.fixture(scope="module")
def plain():
    return run(PLAIN, batches=3)


@pytest.fixture(scope="module")
def vanilla():
    return run(Arm("vanilla_stagewise"), batches=3)


def test_selection_without_expansion_is_conventional_training_bit_for_bit(vanilla, plain):
    assert equal(run(Arm("selection_only", apex={"expansion": False}), batches=3), vanilla)
    assert not equal(plain, vanilla)


@pytest.mark.parametrize(
    "settings",
    [{"apex": {"operator_lr_scale": 1.0}}, {"variation": {"right_scale": 1.0}}],
    ids=["operator rate", "scale of R"],
)
def test_a_factor_of_one_is_the_paper_s_setting_bit_for_bit(plain, settings):
    assert equal(run(Arm("apex_one", **{"apex": {}, **settings}), batches=3), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"apex": {"operator_lr_scale": 10.0}},
        {"apex": {"threshold": 0.25}},
        {"variation": {"right_scale": 3.0}},
        {"variation": {"dense": True}},
        {"variation": {"tied": True}},
        {"variation": {"decay": 0.1}},
        {"variation": {"sites": "ffn"}},
        {"variation": {"sites": "attention"}},
        {"variation": {"scores": "gradient"}},
        {"variation": {"scores": "gradient_weak"}},
        {"variation": {"split": True}},
        {"variation": {"fresh_moments": True}},
    ],
    ids=str,
)
def test_every_variation_changes_the_run(plain, vanilla, settings):
    found = run(Arm("varied", **{"apex": {}, **settings}), batches=3)
    assert not equal(found, plain) and not equal(found, vanilla)


@pytest.mark.parametrize(
    "variation", [{"split": True, "noise": 0.3, "scores": "gradient"}, {"authors": PIECES}], ids=str
)
def test_a_run_comes_out_the_same_again_bit_for_bit(variation):
    arm = Arm("again", apex={}, variation=variation)
    assert equal(run(arm, batches=2), run(arm, batches=2))


@pytest.mark.parametrize("which, other", [("ffn", "self_attn"), ("attention", "mlp")])
def test_sites_that_are_left_out_take_conventional_training_s_first_step(which, other):
    found = start(Arm("subset", apex={}, variation={"sites": which}))
    plain = start(Arm("vanilla"))
    for one in (found, plain):
        train_stage(one, 0, 1)
    own, expected = found.weights(), plain.weights()
    assert all(torch.equal(own[name], expected[name]) for name in own if other in name)
    assert not all(torch.equal(own[name], expected[name]) for name in own)
    assert {site.group.unit for site in found.varied.expander.sites} == (
        {"channel"} if which == "ffn" else {"head", "kv_head"}
    )


def test_an_unknown_variation_is_refused_by_name():
    with pytest.raises(TypeError, match="variation: unknown key 'denze'. Did you mean 'dense'"):
        start(Arm("typo", apex={}, variation={"denze": True}))


@pytest.mark.parametrize(
    "apex, variation, message",
    [
        ({}, {"noise": 0.3}, "noise: acts on the copies that `split` makes"),
        ({"expansion": False}, {"dense": True}, "dense: varies operators, and this arm has none"),
        ({"trainable": "disadvantageous"}, {"decay": 0.1}, "decay: varies operators"),
        ({}, {"dense": True, "right_scale": 3.0}, "right_scale: R is all ones with `dense`"),
        ({}, {"split": False}, "split: got False, allowed: True, or to leave it out"),
        ({}, {"sites": "mlp"}, "sites: got 'mlp', allowed: attention, ffn"),
        ({"method": "random"}, {"scores": "gradient"}, "scores: .* method, which is random"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(apex, variation, message):
    with pytest.raises(ValueError, match=message):
        start(Arm("idle", apex=apex, variation=variation))


@pytest.mark.parametrize("variation", [{}, {"scores": "gradient"}], ids=str)
def test_measuring_changes_neither_random_numbers_nor_training(vanilla, variation):
    arm = Arm("measured", apex={"expansion": False}, variation=variation)
    before = torch.get_rng_state()
    found = start(arm)
    torch.set_rng_state(before)
    state = found.varied.begin(0)
    assert state["masked"] and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in found.model.parameters())
    assert not found.optimizer.state
    assert equal(run(arm, batches=3), vanilla)


def test_stages_say_what_their_units_and_operators_are(plain):
    first, second = plain.begun
    assert set(first["masked"]) == {"whole", "lowest", "top", "random", "heads", "channels"}
    assert "masked" not in second and "overlap" not in first
    assert set(second["overlap"]) == {"heads", "kv_heads", "channels"}
    assert first["selected"] == {"heads": 1, "kv_heads": 1, "channels": 6}
    for facts in plain.begun + plain.ended:
        assert json.loads(json.dumps(facts)) == facts
        # Tables are made of numbers: a list would be left out of them.
        assert all(isinstance(value, int | float) for value in flatten(facts).values())
    for facts in plain.ended:
        assert set(facts["operators"]) == {
            f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        assert facts["relative_norm"] > 0 and facts["effective_rank"] > 1


def test_a_plain_stage_comes_first_where_it_is_asked_for(vanilla):
    """Paper C.3, conventional first: no bit of the first stage, and some of the second."""
    arm = Arm("scratch_apex", apex={}, variation={"plain_stages": 1})
    assert equal(run(arm, stages=1, batches=3), run(Arm("vanilla"), stages=1, batches=3))
    assert not equal(run(arm, batches=3), vanilla)
    assert equal(run(Arm("a", apex={}, variation={"plain_stages": 2}), batches=3), vanilla)


def test_a_variation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="variation: split varies split of APEX and has none"):
        Arm("split", variation={"split": True})
