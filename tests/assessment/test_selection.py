"""How many units are selected, and which."""

import pytest
import torch
from by_hand import ByHand
from helpers import largest, tiny_llama, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apex_composer import Expander
from apex_composer.assessment.selection import (
    count_by_group,
    count_selected,
    seeded_generator,
    select,
    select_groups,
    select_random,
)
from apex_composer.model.find_sites import find_sites
from apex_composer.model.sites import Group
from apex_composer.ops.monarch import has_factor_pair


def group_of(units: int, unit_size: int = 1, name: str = "g") -> Group:
    return Group(name, "channel" if unit_size == 1 else "head", units, unit_size, nn.Identity())


def test_a_seed_and_names_decide_the_numbers():
    def draw(*names):
        return torch.rand(4, generator=seeded_generator(*names)).tolist()

    assert draw(17, "factors", 0, "a") == draw(17, "factors", 0, "a")
    different = [
        draw(17, "factors", 0, "a"),
        draw(18, "factors", 0, "a"),
        draw(17, "selection", 0, "a"),
        draw(17, "factors", 1, "a"),
        draw(17, "factors", 0, "b"),
    ]
    assert len({tuple(numbers) for numbers in different}) == 5


def test_seeds_stay_the_same_over_versions_and_machines():
    """A resumed run must draw what the killed one would have drawn; Python's hash() would not."""
    generator = seeded_generator(17, "factors", 1, "q_proj.weight")
    assert generator.initial_seed() == 3513032920826897790


@pytest.mark.parametrize(
    ("units", "unit_size", "threshold", "count"),
    [
        (5632, 1, 0.125, 704),  # TinyLLaMA's channels: 22 x 32
        (5632, 1, 0.1875, 1056),  # 32 x 33
        (32, 64, 0.125, 4),  # TinyLLaMA's heads: 256 = 16 x 16
        (1408, 1, 0.125, 176),  # 11 x 16
        (1376, 1, 0.125, 171),  # 172 = 4 x 43 is too lopsided, 171 = 9 x 19 is not
        (20, 4, 0.125, 3),  # 2.5 rounds up
        (12, 4, 0.125, 2),  # 1.5 rounds up
        (11, 4, 0.125, 1),  # 1.375 rounds down
        (4, 64, 0.125, 1),  # at least one
        (10, 1, 0.5, 4),  # 5 has no factor pair
        (9, 4, 0.5, 4),  # 4.5 would round up to more than half
        (2, 8, 0.01, 1),
        (1, 8, 0.5, 0),  # no room for both sides
    ],
)
def test_units_on_each_side(units, unit_size, threshold, count):
    assert count_selected(group_of(units, unit_size), threshold) == count


@pytest.mark.parametrize(("units", "count"), [(4, 0), (7, 0), (8, 1), (16, 2)])
def test_kv_heads_are_left_alone_below_one(units, count):
    assert count_selected(group_of(units, 64), 0.125, at_least_one=False) == count


@given(st.integers(1, 3000), st.sampled_from([1, 8, 64, 80, 96, 128]), st.floats(0.001, 0.5))
@settings(max_examples=200)
def test_selected_units_fit_twice_and_have_a_factor_pair(units, unit_size, threshold):
    group = group_of(units, unit_size)
    count = count_selected(group, threshold)
    assert 2 * count <= units
    assert count <= max(1, threshold * units + 0.5)
    if units >= 2:
        assert count >= 1 and has_factor_pair(count * unit_size)
    wanted = min(max(1, int(threshold * units + 0.5)), units // 2)
    assert not any(has_factor_pair(k * unit_size) for k in range(count + 1, wanted + 1))


small_scores = st.lists(st.integers(-2, 2), min_size=2, max_size=12)


@given(small_scores, st.data())
@settings(max_examples=200)
def test_selection_gives_ties_to_the_lower_index(scores, data):
    count = data.draw(st.integers(1, len(scores) // 2))
    order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    best = order[:count]
    rest = sorted(order[count:], key=lambda unit: (scores[unit], unit))
    found = select(torch.tensor(scores), count)
    assert found.advantageous.tolist() == sorted(best)
    assert found.disadvantageous.tolist() == sorted(rest[:count])
    assert found.advantageous.dtype == found.disadvantageous.dtype == torch.int64


def test_equal_scores_still_give_disjoint_sets():
    found = select(torch.zeros(6), 3)
    assert found.advantageous.tolist() == [0, 1, 2]
    assert found.disadvantageous.tolist() == [3, 4, 5]


def test_random_selection_is_disjoint_and_repeatable():
    group = group_of(40)
    found = select_random(group, 20, seed=17, stage=0)
    assert sorted(found.advantageous.tolist() + found.disadvantageous.tolist()) == list(range(40))
    assert found.advantageous.tolist() == sorted(found.advantageous.tolist())
    again = select_random(group, 20, seed=17, stage=0)
    assert torch.equal(found.advantageous, again.advantageous)
    assert torch.equal(found.disadvantageous, again.disadvantageous)


def test_random_selection_differs_by_seed_stage_and_group():
    drawn = [
        select_random(group_of(100, name=name), 10, seed=seed, stage=stage)
        for name, seed, stage in (("a", 1, 0), ("b", 1, 0), ("a", 2, 0), ("a", 1, 1))
    ]
    assert len({tuple(s.advantageous.tolist()) for s in drawn}) == 4


@pytest.mark.parametrize(
    ("kv_heads", "threshold", "expected"),
    [
        ("auto", 0.125, {"heads": 1, "channels": 3}),  # a share of 2 KV heads is below one
        ("auto", 0.5, {"heads": 4, "kv_heads": 1, "channels": 12}),
        ("expand", 0.125, {"heads": 1, "kv_heads": 1, "channels": 3}),
        ("skip", 0.5, {"heads": 4, "channels": 12}),
    ],
)
def test_counts_of_a_models_groups(kv_heads, threshold, expected):
    sites = find_sites(tiny_llama(heads=8, kv_heads=2))
    counts = count_by_group(sites, threshold, kv_heads)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found = {name.split(".")[-1]: n for name, n in counts.items() if name.startswith(prefix)}
        assert found == expected


def test_a_group_too_small_for_two_sides_is_refused():
    sites = find_sites(tiny_llama(heads=1, kv_heads=1))
    with pytest.raises(ValueError, match=r"0\.25 of the 1 units of model\.layers\.0.*targets"):
        count_by_group(sites, 0.25, "auto")


def test_a_single_kv_head_is_left_alone_unless_forced():
    sites = find_sites(tiny_llama(kv_heads=1))
    assert not any("kv_heads" in name for name in count_by_group(sites, 0.5, "auto"))
    with pytest.raises(ValueError, match=r"1 units of .*kv_heads rounds .*`kv_heads: skip`"):
        count_by_group(sites, 0.5, "expand")


def check_selection(expander: Expander, group: str, values: list, count: int) -> None:
    """P and N are the units with the highest and the lowest values, none of the two twice."""
    found = expander.selections[group]
    top = largest(values, count)
    rest = [place for place in range(len(values)) if place not in top]
    bottom = {rest[place] for place in largest([-values[place] for place in rest], count)}
    assert (set(found.advantageous.tolist()), set(found.disadvantageous.tolist())) == (top, bottom)


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["rank", "average"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selection_by_ranks_and_by_average_norms(method, kv_heads):
    """A KV head's value is the sum over the query heads that share it."""
    model = tiny_llama(kv_heads=kv_heads, dtype=torch.float64)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand", method=method)
    hand = ByHand(model).count(tokens(7))
    with expander.assessing(), torch.no_grad():
        model(tokens(7))
    expander.begin_stage()
    values = hand.scores if method == "rank" else hand.norm_sums
    for layer in range(2):
        channels = f"model.layers.{layer}.mlp.channels"
        check_selection(expander, channels, values[channels], 6)
        heads = values[f"model.layers.{layer}.self_attn.heads"]
        check_selection(expander, f"model.layers.{layer}.self_attn.heads", heads, 1)
        share = 4 // kv_heads
        sums = [sum(heads[i * share : (i + 1) * share]) for i in range(kv_heads)]
        check_selection(expander, f"model.layers.{layer}.self_attn.kv_heads", sums, 1)


def test_a_kv_heads_score_is_the_sum_over_the_query_heads_that_share_it():
    """Three query heads each: no single one of them ranks the KV heads as their sums do."""
    sites = find_sites(tiny_llama(hidden=48, heads=6, kv_heads=2, layers=1))
    groups = {s.group.name.split(".")[-1]: s.group for s in sites}
    values = {groups["heads"].name: torch.tensor([2, 2, -3, 0, 0, 2])}
    kv_heads = groups["kv_heads"]
    found = select_groups([kv_heads], {kv_heads.name: 1}, values, seed=0, stage=0)[kv_heads.name]
    assert (found.advantageous.tolist(), found.disadvantageous.tolist()) == ([1], [0])
