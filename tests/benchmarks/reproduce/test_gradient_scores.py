from dataclasses import replace

import pytest
import torch
from reproduce.arms import Arm
from reproduce.gradient_scores import gradient_scores, score_by_gradients, strong_first
from reproduce.model import build_model
from tiny_arms import CPU, SCALE, VOCABULARY, start, train_stage
from torch import nn

from apex_composer import Expander, find_sites
from apex_composer.assessment.selection import select


def started_with(scores=None):
    variation = {} if scores is None else {"scores": scores}
    return start(Arm("scores", apex={}, variation=variation))


def test_a_unit_s_gradient_score_is_what_the_loss_loses_with_a_little_of_it():
    started = start(Arm("scores", apex={}), double=True)
    group = next(g for g in started.varied.expander.groups if g.unit == "head")
    # One token counts, so that the mean over tokens is its own change.
    batch = started.order.batch(0)[:1, :2]
    found = gradient_scores(started.model, [group], [batch])[group.name]
    assert found.shape == (8,) and found.dtype == torch.float64
    step, unit = 1e-6, 3
    losses = [exact_loss(started.model, batch, group, unit, by) for by in (1 + step, 1 - step)]
    slope = abs(losses[0] - losses[1]) / (2 * step)
    assert slope > 0
    assert float(found[unit]) == pytest.approx(slope, rel=1e-4)  # the loss itself is in float32


@torch.no_grad()
def exact_loss(model, batch, group, unit, factor):
    """In float64, with one unit multiplied by a factor, a number or [windows, tokens, 1]."""
    units = torch.arange(group.units).repeat_interleave(group.unit_size)
    gate = torch.where(units == unit, torch.as_tensor(factor, dtype=torch.float64), 1.0)
    handle = group.probe.register_forward_pre_hook(lambda _, inputs: inputs[0] * gate)
    logits = model(input_ids=batch[:, :-1]).logits.flatten(0, 1)
    handle.remove()
    return float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten()))


def test_a_score_is_the_mean_over_tokens_of_what_each_token_s_unit_is_worth():
    started = start(Arm("scores", apex={}), double=True)
    group = next(g for g in started.varied.expander.groups if g.unit == "channel")
    batch, unit, step = started.order.batch(0)[:2, :4], 7, 1e-5
    found = gradient_scores(started.model, [group], [batch, batch])[group.name]
    slopes = []
    for place in range(6):
        token = torch.zeros(2, 3, 1, dtype=torch.float64)
        token.view(-1)[place] = 1
        losses = [
            exact_loss(started.model, batch, group, unit, 1 + by * token) for by in (step, -step)
        ]
        slopes.append(abs(losses[0] - losses[1]) / (2 * step))
    assert min(slopes) > 0
    assert float(found[unit]) == pytest.approx(sum(slopes) / 6, rel=1e-4)


def test_heads_that_share_keys_have_no_weak_ones_of_their_own():
    model = build_model(replace(SCALE.sizes, kv_heads=4), VOCABULARY, CPU, seed=0)
    expander = Expander(find_sites(model), threshold=0.25, method="average")
    batch = torch.zeros(1, 9, dtype=torch.int64)
    with expander.assessing():
        model(input_ids=batch)
    with pytest.raises(ValueError, match="gradient_weak: .* 4 key heads of 8 query heads"):
        score_by_gradients(expander, model, [batch], "gradient_weak")
    score_by_gradients(expander, model, [batch], "gradient")


def test_gradient_scores_leave_no_gradients_and_no_hooks():
    started = started_with()
    groups = [g for g in started.varied.expander.groups if g.assessed_by is None]
    hooks = [len(group.probe._forward_pre_hooks) for group in groups]
    gradient_scores(started.model, groups, [started.order.batch(0)])
    assert all(parameter.grad is None for parameter in started.model.parameters())
    assert hooks == [len(group.probe._forward_pre_hooks) for group in groups]


def test_units_are_selected_by_their_gradient_scores():
    started, plain = started_with("gradient"), started_with()
    expander = started.varied.expander
    groups = [g for g in expander.groups if g.assessed_by is None]
    batches = [started.order.batch(place) for place in range(2)]
    expected = gradient_scores(started.model, groups, batches)
    started.varied.begin(0)
    plain.varied.begin(0)
    for group in groups:
        own = select(expected[group.name], expander.counts[group.name])
        pairs = zip(own, expander.selections[group.name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert expander.selections.keys() == plain.varied.expander.selections.keys()


def test_strong_units_by_rank_and_weak_ones_by_gradients():
    started, plain = started_with("gradient_weak"), started_with()
    groups = [g for g in started.varied.expander.groups if g.assessed_by is None]
    batches = [started.order.batch(place) for place in range(2)]
    values = gradient_scores(started.model, groups, batches)
    started.varied.begin(0)
    plain.varied.begin(0)
    for group in groups:
        strong, weak = started.varied.expander.selections[group.name]
        assert torch.equal(strong, plain.varied.expander.selections[group.name].advantageous)
        rest = torch.ones(group.units, dtype=torch.bool)
        rest[strong], rest[weak] = False, False
        assert values[group.name][weak].max() <= values[group.name][rest].min()


def test_strong_first_keeps_the_values_of_all_others():
    scores, values = torch.tensor([5, 1, 9, 0]), torch.tensor([0.1, 0.4, 0.2, 0.3])
    found = strong_first(scores, values, 1)
    assert found.argmax() == 2
    assert torch.equal(found[[0, 1, 3]], values[[0, 1, 3]])


def test_later_stages_go_by_the_gradients_of_their_own_batches():
    started = started_with("gradient")
    train_stage(started, 0, 5)
    first = started.varied.expander.ranked
    train_stage(started, 1, 2)
    second = started.varied.expander.ranked
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_other_scores_are_refused():
    started = started_with()
    with pytest.raises(ValueError, match="scores: got 'taylor', allowed: gradient, gradient_weak"):
        score_by_gradients(started.varied.expander, started.model, [], "taylor")
