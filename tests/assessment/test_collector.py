"""Scores against a slow count by hand; `test_collector_left_out.py` has what must not count."""

import pytest
import torch
from by_hand import ByHand, assert_same, make_assessment, tiny_llama, totals_of
from helpers import tokens

from apex_composer import Expander, Group, find_sites
from apex_composer.assessment import collector, scores
from apex_composer.assessment.collector import Assessment

pytestmark = pytest.mark.numeric


def add_dead_channels(model, channels: int = 9):
    """Give the last channels of every layer the same norm on every sample: zero."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[-channels:] = 0
    return model


@pytest.mark.parametrize("dead", [False, True])
def test_scores_equal_a_count_by_hand(dead):
    model = tiny_llama(kv_heads=2, layers=3)
    if dead:
        add_dead_channels(model)
    batches = [tokens(5, seed=1), tokens(3, length=12, seed=2)]
    hand = ByHand(model).count(batches[0]).count(batches[1])
    hand.check(totals_of(model, *batches))
    some = hand.scores["model.layers.0.mlp.channels"]
    assert max(some) > 0 > min(some)


def test_scores_of_bfloat16_computation_are_those_of_its_own_activations():
    """The same activations: where ranks are decided, their norms differ by 2e-3 or more."""
    model = tiny_llama(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        # Added up in float32: 8 x 8 positive numbers at most, each sum rounded to 6e-8 of itself.
        ByHand(model).count(tokens(6)).check(totals_of(model, tokens(6)), tolerance=1e-5)


def ragged(samples: int, length: int = 8):
    """Token ids and a mask that pads sample i by i % 4 tokens at the end."""
    ids, mask = tokens(samples, length), torch.ones(samples, length, dtype=torch.int64)
    for sample in range(samples):
        mask[sample, length - sample % 4 :] = 0
    return ids, mask


def test_scores_of_inference_mode_are_those_without_gradients_and_training_adds_to_them():
    """Its tensors cannot be written outside of it, and the buffers are."""
    totals = []
    for mode in (torch.inference_mode, torch.no_grad):
        model = tiny_llama()
        assessment = make_assessment(model)
        with mode(), assessment.assessing():
            model(tokens(4))
        for seed in (1, 2):
            with assessment.assessing():
                model(tokens(4, seed=seed), labels=tokens(4, seed=seed)).loss.backward()
        totals.append(assessment.totals())
    assert_same(*totals)


def test_padded_tokens_do_not_count():
    model = tiny_llama()
    ids, mask = ragged(8)
    assessment, hand = make_assessment(model), ByHand(model)
    with assessment.assessing(mask), torch.no_grad():
        model(ids, attention_mask=mask)
    for sample, kept in zip(ids, mask.bool(), strict=True):
        hand.count(sample[kept].unsqueeze(0))
    hand.check(assessment.totals())
    # Without the mask they do count, so the comparison above means something.
    scores = [totals_of(model, ids)[name].scores.tolist() for name in hand.scores]
    assert scores != list(hand.scores.values())


def test_a_sample_of_padding_only_does_not_count():
    model = tiny_llama()
    ids, mask = tokens(5), torch.ones(5, 8)
    mask[2] = 0
    expected = totals_of(model, ids[[0, 1, 3, 4]])
    assert_same(totals_of(model, ids, mask=mask), expected)


def test_padding_alone_gives_no_totals():
    model = tiny_llama()
    expander = Expander(find_sites(model), threshold=0.25)
    with expander.assessing(torch.zeros(2, 8)), torch.no_grad():
        model(tokens(2))
    assert expander.assessment.totals() == {}
    with pytest.raises(RuntimeError, match="no scores to select units from"):
        expander.begin_stage()


def test_several_forwards_in_one_block_count_each():
    model = tiny_llama()
    batches = [tokens(3, seed=seed) for seed in range(3)]
    assessment = make_assessment(model)
    with assessment.assessing(), torch.no_grad():
        for ids in batches:
            model(ids)
    assert_same(assessment.totals(), totals_of(model, *batches))
    assert assessment.totals()["model.layers.0.mlp.channels"].samples == 9


@pytest.mark.parametrize(("most", "before", "after"), [(1, 3, 3), (2**20, 0, 1)])
def test_forward_passes_are_ranked_together_unless_they_hold_too_much(
    monkeypatch, most, before, after
):
    """Of one of three passes a sample is nothing but padding."""
    model, ids, ranked = tiny_llama(), tokens(4), []

    def count_samples(*arguments):
        ranked.append(arguments)
        return scores.count_samples(*arguments)

    monkeypatch.setattr(collector, "_MOST_UNRANKED_BYTES", most)
    monkeypatch.setattr(collector, "count_samples", count_samples)
    assessment, hand = make_assessment(model), ByHand(model)
    mask = torch.ones_like(ids)
    mask[1] = 0
    for own, counting in ((None, ids), (mask, ids[[0, 2, 3]]), (None, ids)):
        assessment.open(own)
        with torch.no_grad():
            model(ids)
        assessment.close()
        hand.count(counting)
    cohorts = 2  # heads and channels
    assert len(ranked) == before * cohorts
    assessment.commit()
    assert len(ranked) == after * cohorts
    hand.check(assessment.totals())


def test_reset_forgets_all():
    model = tiny_llama()
    assessment = make_assessment(model)
    for ids in (tokens(4, seed=1), tokens(4)):
        assessment.reset()
        assert assessment.totals() == {}
        with assessment.assessing(), torch.no_grad():
            model(ids)
    assert_same(assessment.totals(), totals_of(model, tokens(4)))


def test_removed_hooks_count_nothing_more():
    model = tiny_llama()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    assessment = make_assessment(model)
    assert [len(module._forward_pre_hooks) for module in model.modules()] != before
    assessment.remove()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


def test_a_saved_assessment_goes_on():
    model = tiny_llama()
    first, second = tokens(4, seed=1), tokens(6, seed=2)
    expected = totals_of(model, first)
    resumed = make_assessment(model)
    with resumed.assessing(), torch.no_grad():
        model(tokens(2, seed=3))  # replaced by what is loaded
    resumed.load_totals({name: list(total) for name, total in expected.items()})
    saved = resumed.totals()
    with resumed.assessing(), torch.no_grad():
        model(second)
    assert_same(resumed.totals(), totals_of(model, first, second))
    assert_same(saved, expected)  # what was saved does not go on
    resumed.load_totals({})
    assert resumed.totals() == {}


def test_a_mask_of_other_samples_is_refused():
    """One block per mask: that of a whole batch does not fit its microbatches."""
    model, (ids, mask) = tiny_llama(), ragged(4)
    assessment = make_assessment(model)
    with (
        pytest.raises((ValueError, RuntimeError)),
        assessment.assessing(mask),
        torch.no_grad(),
    ):
        for microbatch in ids.split(1):
            model(microbatch)


def test_a_full_mask_still_tells_unpadded_samples_apart():
    """MPT without padding in its FFN hands over [tokens, channels], whether padded or not."""
    probe = torch.nn.Linear(4, 2)
    group = Group("channels", "channel", 4, 1, probe)
    assessment = Assessment([(group, 1)])
    values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for activation in (values, values.flatten(0, 1)):
        assessment.open(torch.ones(2, 3, dtype=torch.bool), full=True)
        probe(activation)
        assessment.close()
    assessment.commit()
    totals = assessment.totals()["channels"]
    norms = values.double().square().sum(1).sqrt().sum(0)
    assert totals.samples == 4
    # Three squares of float32 and a root: half a dozen roundings to 6e-8 at most.
    torch.testing.assert_close(totals.norm_sums, 2 * norms, rtol=1e-6, atol=0)
