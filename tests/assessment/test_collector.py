"""Scores against a slow count by hand, and everything that must not count.

In float64: the same samples in other batches give other roundings, and in float32 one of them can
change a rank where two norms are next to equal.
"""

from functools import partial

import helpers
import pytest
import torch
from helpers import largest, tokens
from torch.utils.checkpoint import checkpoint

from apex_composer import Expander, Group, find_sites
from apex_composer.assessment.collector import Assessment, _say_packed
from apex_composer.assessment.scores import GroupTotals

pytestmark = pytest.mark.numeric

tiny_llama = partial(helpers.tiny_llama, dtype=torch.float64)
COUNTS = {"head": 1, "channel": 6}  # threshold 0.25 of 4 heads and 24 channels


def assessed_groups(model) -> list:
    """Query heads and channels of every layer, with their K."""
    groups = {s.group.name: s.group for s in find_sites(model) if s.group.unit in COUNTS}
    return [(group, COUNTS[group.unit]) for group in groups.values()]


def make_assessment(model) -> Assessment:
    return Assessment(assessed_groups(model))


def add_dead_channels(model, channels: int = 9):
    """Give the last channels of every layer the same norm on every sample: zero."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[-channels:] = 0
    return model


class ByHand:
    """Scores of eq. 3 by hooks and loops of its own."""

    def __init__(self, model):
        self.model, self.groups = model, assessed_groups(model)
        self.scores = {group.name: [0] * group.units for group, _ in self.groups}
        self.norm_sums = {group.name: [0.0] * group.units for group, _ in self.groups}
        self.samples = 0

    def count(self, ids) -> "ByHand":
        """Add the samples of one forward pass."""
        seen = {}
        handles = [
            group.probe.register_forward_pre_hook(
                lambda _, inputs, name=group.name: seen.update({name: inputs[0].detach()})
            )
            for group, _ in self.groups
        ]
        with torch.no_grad():
            self.model(ids)
        for handle in handles:
            handle.remove()
        self.samples += len(ids)
        for group, count in self.groups:
            for sample in seen[group.name].double():
                units = sample.unflatten(-1, (group.units, group.unit_size))
                norms = [units[:, unit].square().sum().sqrt().item() for unit in range(group.units)]
                top, bottom = largest(norms, count), largest([-norm for norm in norms], count)
                for unit, norm in enumerate(norms):
                    self.scores[group.name][unit] += (unit in top) - (unit in bottom)
                    self.norm_sums[group.name][unit] += norm
        return self

    def check(self, totals: dict[str, GroupTotals], tolerance: float = 1e-11) -> None:
        assert totals.keys() == self.scores.keys()
        for name, total in totals.items():
            assert total.samples == self.samples
            assert total.scores.dtype == torch.int64
            assert total.scores.tolist() == self.scores[name], name
            assert total.norm_sums.tolist() == pytest.approx(self.norm_sums[name], rel=tolerance)


def assert_same(first: dict[str, GroupTotals], second: dict[str, GroupTotals]) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].samples == second[name].samples
        assert torch.equal(first[name].scores, second[name].scores), name
        torch.testing.assert_close(
            first[name].norm_sums, second[name].norm_sums, rtol=1e-11, atol=0
        )


def totals_of(model, *batches, mask=None) -> dict[str, GroupTotals]:
    """Totals after the given forward passes, by an assessment that is taken off again."""
    assessment = make_assessment(model)
    for ids in batches:
        with assessment.assessing(mask), torch.no_grad():
            model(ids)
    assessment.remove()
    return assessment.totals()


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scores_equal_a_count_by_hand(kv_heads, dead):
    model = tiny_llama(kv_heads=kv_heads, layers=3)
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


def test_forwards_outside_do_not_count():
    model = tiny_llama()
    assessment = make_assessment(model)
    with torch.no_grad():
        model(tokens(3, seed=1))
        with assessment.assessing():
            model(tokens(3))
        model(tokens(3, seed=2))
    assert_same(assessment.totals(), totals_of(model, tokens(3)))


def test_nothing_assessed_gives_no_totals():
    assessment = make_assessment(tiny_llama())
    assert assessment.totals() == {}
    with assessment.assessing():
        pass
    assert assessment.totals() == {}


def train_inside(model, ids) -> tuple[dict[str, GroupTotals], int]:
    """Totals of a forward and a backward pass in one block, and how often a probe was called."""
    calls = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    assessment = make_assessment(model)
    with assessment.assessing():
        model(ids, labels=ids).loss.backward()
    assessment.remove()
    handle.remove()
    return assessment.totals(), len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_activation_checkpointing_does_not_count(reentrant):
    ids = tokens(4)
    expected, calls = train_inside(tiny_llama().train(), ids)
    assert calls == 1
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, calls = train_inside(model, ids)
    assert calls == 2, "checkpointing was not at work"
    assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_a_checkpointed_ffn_does_not_count(reentrant):
    ids = tokens(4)
    expected, _ = train_inside(tiny_llama(), ids)
    model = tiny_llama()
    for layer in model.model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
    found, calls = train_inside(model, ids)
    assert calls == 2, "checkpointing was not at work"
    assert_same(found, expected)


def test_a_batch_that_runs_out_of_memory_counts_once_it_succeeds():
    """Two microbatches of four, then four of two, as Composer retries a batch."""
    model, ids = tiny_llama(), tokens(8)
    assessment = make_assessment(model)
    committed = tokens(2, seed=9)
    with assessment.assessing(), torch.no_grad():
        model(committed)

    def fail(module, inputs):
        raise torch.OutOfMemoryError("simulated")

    def attempt(size: int, failing: int | None = None) -> None:
        for place, microbatch in enumerate(ids.split(size)):
            if place == failing:
                model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
            assessment.open()
            with torch.no_grad():
                model(microbatch)
            assessment.close()

    with pytest.raises(torch.OutOfMemoryError):
        attempt(4, failing=1)
    model.model.layers[1].mlp.down_proj._forward_pre_hooks.popitem()
    assessment.discard()
    attempt(2)
    assessment.commit()
    assert_same(assessment.totals(), totals_of(model, committed, ids))


def test_a_block_that_raises_is_forgotten():
    model, ids = tiny_llama(), tokens(4)
    assessment = make_assessment(model)
    with pytest.raises(torch.OutOfMemoryError), assessment.assessing(), torch.no_grad():
        model(ids)
        raise torch.OutOfMemoryError("simulated")
    assert assessment.totals() == {}
    with torch.no_grad():
        model(ids)  # the block is closed: this does not count
    assert assessment.totals() == {}
    with assessment.assessing(), torch.no_grad():
        model(ids)
    assert_same(assessment.totals(), totals_of(model, ids))


def test_a_forward_that_misses_a_group_is_an_error():
    model = tiny_llama()
    assessment = make_assessment(model)
    model.config.num_hidden_layers = 1  # the second layer is left out
    with (
        pytest.raises(RuntimeError, match=r"did not reach model\.layers\.1\."),
        assessment.assessing(),
    ):
        model(tokens(2))
    assert assessment.totals() == {}


def test_reset_forgets_all():
    model = tiny_llama()
    assessment = make_assessment(model)
    for ids in (tokens(4, seed=1), tokens(4)):
        assessment.reset()
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
    saved = totals_of(model, first)
    resumed = make_assessment(model)
    with resumed.assessing(), torch.no_grad():
        model(tokens(2, seed=3))  # replaced by what is loaded
    resumed.load_totals(saved)
    assert_same(resumed.totals(), saved)
    with resumed.assessing(), torch.no_grad():
        model(second)
    assert_same(resumed.totals(), totals_of(model, first, second))


def test_loading_nothing_forgets_all():
    model = tiny_llama()
    assessment = make_assessment(model)
    with assessment.assessing(), torch.no_grad():
        model(tokens(2))
    assessment.load_totals({})
    assert assessment.totals() == {}


def test_totals_do_not_change_when_more_is_counted():
    model = tiny_llama()
    assessment = make_assessment(model)
    with assessment.assessing(), torch.no_grad():
        model(tokens(4))
    totals = assessment.totals()
    with assessment.assessing(), torch.no_grad():
        model(tokens(4, seed=1))
    assert_same(totals, totals_of(model, tokens(4)))


def test_mean_norms():
    totals = GroupTotals(torch.zeros(2, dtype=torch.int64), torch.tensor([3.0, 6.0]).double(), 3)
    assert totals.mean_norms().tolist() == [1.0, 2.0]


def check_selection(expander: Expander, group: str, values: list, count: int) -> None:
    """P and N are the units with the highest and the lowest values, none of the two twice."""
    found = expander.selections[group]
    top = largest(values, count)
    rest = [place for place in range(len(values)) if place not in top]
    bottom = {rest[place] for place in largest([-values[place] for place in rest], count)}
    assert (set(found.advantageous.tolist()), set(found.disadvantageous.tolist())) == (top, bottom)


@pytest.mark.parametrize("method", ["rank", "average"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selection_by_ranks_and_by_average_norms(method, kv_heads):
    """A KV head's value is the sum over the query heads that share it."""
    model = tiny_llama(kv_heads=kv_heads, layers=3)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand", method=method)
    hand = ByHand(model).count(tokens(7))
    with expander.assessing(), torch.no_grad():
        model(tokens(7))
    expander.begin_stage()
    values = hand.scores if method == "rank" else hand.norm_sums
    for layer in range(3):
        channels = f"model.layers.{layer}.mlp.channels"
        check_selection(expander, channels, values[channels], 6)
        heads = values[f"model.layers.{layer}.self_attn.heads"]
        check_selection(expander, f"model.layers.{layer}.self_attn.heads", heads, 1)
        share = 4 // kv_heads
        sums = [sum(heads[i * share : (i + 1) * share]) for i in range(kv_heads)]
        check_selection(expander, f"model.layers.{layer}.self_attn.kv_heads", sums, 1)


def test_a_kv_heads_score_is_the_sum_over_the_query_heads_that_share_it():
    """Three query heads each: no single one of them ranks the KV heads as their sums do."""
    model = tiny_llama(hidden=48, heads=6, kv_heads=2, layers=1)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    scores = {"heads": torch.tensor([2, 2, -3, 0, 0, 2]), "channels": torch.arange(24)}
    expander.assessment.load_totals(
        {
            group.name: GroupTotals(score := scores[group.name.split(".")[-1]], score.double(), 4)
            for group in expander.groups
            if group.unit in COUNTS
        }
    )
    expander.begin_stage()
    found = expander.selections["model.layers.0.self_attn.kv_heads"]
    assert (found.advantageous.tolist(), found.disadvantageous.tolist()) == ([1], [0])


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


SEQUENCES = [[3, 2, 1], [6], [2, 2, 3], [8], [1, 5]]  # lengths, by row of 8 tokens


def packed_and_unpacked():
    """Sequences in rows of 8 tokens, and each in a row of its own: ids of sequences, positions."""
    rows = [[-1] * 8 for _ in SEQUENCES]
    places = []
    for row, lengths in enumerate(SEQUENCES):
        begin = 0
        for place, length in enumerate(lengths):
            rows[row][begin : begin + length] = [place] * length
            places.append((row, begin, length))
            begin += length
    return torch.tensor(rows), places


def unpack(packed: torch.Tensor, places) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences padded at their ends, and the mask."""
    alone = packed.new_zeros(len(places), 8, *packed.shape[2:])
    mask = torch.zeros(len(places), 8, dtype=torch.bool)
    for sample, (row, begin, length) in enumerate(places):
        alone[sample, :length] = packed[row, begin : begin + length]
        mask[sample, :length] = True
    return alone, mask


def isolated(ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of a Llama whose tokens see those of their own sequence only."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    seen = same & torch.ones(8, 8, dtype=torch.bool).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = torch.where(begins, torch.arange(8), 0).cummax(1).values
    return {"attention_mask": hidden.unsqueeze(1), "position_ids": torch.arange(8) - first}


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_count_as_the_unpacked_batch_does(masked):
    model = tiny_llama(dtype=torch.float64)
    ids, places = packed_and_unpacked()
    packed = tokens(len(ids))
    with torch.no_grad():
        first, second = make_assessment(model), make_assessment(model)
        with first.assessing(ids >= 0 if masked else None, ids):
            model(packed, **isolated(ids, torch.float64))
        first.remove()
        alone, mask = unpack(packed, places)
        with second.assessing(mask):
            model(alone, attention_mask=mask)
    found, expected = first.totals(), second.totals()
    for name, total in expected.items():
        assert torch.equal(found[name].scores, total.scores), name
        torch.testing.assert_close(found[name].norm_sums, total.norm_sums, rtol=1e-10, atol=0)
        assert found[name].samples == total.samples == len(places)
    # As rows they count otherwise, so the comparison above means something.
    rows = totals_of(model, packed, mask=ids >= 0)
    assert any(not torch.equal(rows[name].scores, t.scores) for name, t in expected.items())


def test_packed_rows_without_padding_in_the_ffn():
    """MPT hands over [tokens, channels]; the probe is fed directly."""
    probe = torch.nn.Linear(4, 2)
    assessment = Assessment([(Group("channels", "channel", 4, 1, probe), 1)])
    ids, places = packed_and_unpacked()
    values = torch.rand(*ids.shape, 4, generator=torch.Generator().manual_seed(0))
    alone, alone_mask = unpack(values, places)
    totals = []
    for activation, own, mask in ((values[ids >= 0], ids, ids >= 0), (alone, None, alone_mask)):
        with assessment.assessing(mask, own):
            probe(activation)
        totals.append(assessment.totals())
        assessment.reset()
    assert_same(*totals)


def test_packed_rows_are_left_to_torch_and_that_is_said_once(caplog):
    group = Group("channels", "channel", 4, 1, torch.nn.Linear(4, 2))
    assessment = Assessment([(group, 1)], implementation="triton")
    ids, _ = packed_and_unpacked()
    _say_packed.cache_clear()
    with caplog.at_level("INFO", "apex_composer.assessment.collector"):
        for _ in range(2):
            assessment.open(sequence_id=ids)
            assert assessment.reserve_norms("channels", torch.ones(*ids.shape, 4)) is None
            assessment.discard()
    assert [record.message for record in caplog.records] == [
        "apex: norms of packed rows by torch, because there is no kernel for them"
    ]
