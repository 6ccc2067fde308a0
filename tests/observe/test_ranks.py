"""Ranks of matrices whose ranks and angles are known."""

import math

import pytest
import torch
from helpers import linear_site, selection, tiny_llama
from tiny_models import CONFIGURATIONS, tiny_model

from apex_composer.model.find_sites import find_sites
from apex_composer.observe.ranks import (
    default_tolerance,
    describe_weight,
    entropy_rank,
    measure_ranks,
    rank_changes,
    row_space_overlap,
)


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def with_values(rows: int, columns: int, values: list[float]) -> torch.Tensor:
    """A matrix with given singular values, in no special direction."""
    count = len(values)
    left, right = orthogonal(rows, 1)[:, :count], orthogonal(columns, 2)[:count]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right


def site_of(weight: torch.Tensor, axis: int = 0, **options):
    site = linear_site(*weight.shape, axis=axis, dtype=weight.dtype, **options)
    with torch.no_grad():
        site.module.weight.copy_(weight)
    return site


def entry_of(site, units=None, **options) -> dict:
    selections = None if units is None else {site.group.name: units}
    return dict(measure_ranks([site], selections, device="cpu", **options))[site.name]


def test_known_singular_values_give_known_ranks():
    values = [4.0, 2.0, 1.0, 1.0, 0.0]
    entry = entry_of(site_of(with_values(9, 7, values)))
    shares = [value / 8 for value in values if value]
    assert entry["shape"] == [9, 7]
    assert entry["numerical_rank"] == 4
    assert entry["tolerance"] == pytest.approx(4 * 9 * torch.finfo(torch.float64).eps)
    assert entry["entropy_rank"] == pytest.approx(math.prod(p**-p for p in shares))
    assert entry["advantageous_rank"] is None and entry["row_space_overlap"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_tolerance_is_that_of_torch_in_the_computed_dtype(dtype):
    weight = with_values(12, 20, [10.0**-power for power in range(12)]).to(dtype)
    wide = weight if dtype == torch.float64 else weight.float()
    assert entry_of(site_of(weight))["numerical_rank"] == torch.linalg.matrix_rank(wide)
    assert default_tolerance((4096, 11008), torch.bfloat16) > 1  # why its own eps is not taken


def test_rounding_to_bfloat16_fills_a_rank_which_a_tolerance_finds_again():
    weight = with_values(40, 40, [1.0] * 8)
    found = [
        entry_of(site_of(one), tolerance=tolerance)["numerical_rank"]
        for one, tolerance in ((weight, None), (weight.bfloat16(), None), (weight.bfloat16(), 0.01))
    ]
    assert found == [8, 40, 8]


def test_equal_singular_values_have_the_full_entropy_rank_and_zero_has_none():
    assert entropy_rank(torch.full((6,), 0.3)) == pytest.approx(6)
    assert entropy_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    entry = entry_of(site_of(torch.zeros(4, 5, dtype=torch.float64)), selection([0], [1]))
    assert (entry["numerical_rank"], entry["entropy_rank"]) == (0, 0)
    assert entry["row_space_overlap"] is None  # no space, no angle


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(angle):
    basis = orthogonal(8)
    tilted = torch.stack(
        [
            math.cos(angle) * basis[0] + math.sin(angle) * basis[4],
            math.cos(angle) * basis[1] + math.sin(angle) * basis[5],
        ]
    )
    first, second = basis[:3], tilted  # the third row has no partner: the smaller space counts
    assert row_space_overlap(first, second) == pytest.approx(math.cos(angle) ** 2)
    cosines = torch.linalg.svdvals(first @ second.T)
    assert row_space_overlap(first, second) == pytest.approx(float(cosines.square().mean()))


@pytest.mark.parametrize("axis", [0, 1])
def test_sides_have_ranks_of_their_own_and_one_tolerance(axis):
    basis = orthogonal(12)
    strong, weak = basis[:4], 1e-3 * basis[[4, 0, 4, 0]]  # one of two directions is W[P]'s
    rows = torch.cat([strong, weak, basis[8:12]])
    site = site_of(rows if axis == 0 else rows.T, axis)
    entry = entry_of(site, selection([0, 1, 2, 3], [4, 5, 6, 7]))
    assert entry["selected_rows"] == 4
    assert (entry["advantageous_rank"], entry["disadvantageous_rank"]) == (4, 2)
    assert entry["advantageous_entropy_rank"] == pytest.approx(4)
    assert entry["disadvantageous_entropy_rank"] == pytest.approx(2)
    assert entry["row_space_overlap"] == pytest.approx(0.5)
    assert entry["overlap_by_chance"] == pytest.approx(4 / 12)
    above = entry_of(site, selection([0, 1, 2, 3], [4, 5, 6, 7]), tolerance=0.01)
    assert (above["advantageous_rank"], above["disadvantageous_rank"]) == (4, 0)


def test_chance_is_what_random_spaces_have_on_average():
    spaces = [orthogonal(40, seed)[:, :10].T for seed in range(40)]
    found = [row_space_overlap(a, b) for a, b in zip(spaces[::2], spaces[1::2], strict=True)]
    assert sum(found) / len(found) == pytest.approx(10 / 40, rel=0.1)


@pytest.mark.parametrize("model_type", sorted(CONFIGURATIONS))
def test_weights_of_every_architecture_are_cut_as_the_expander_cuts_them(model_type):
    sites = find_sites(tiny_model(model_type, torch.float64))
    found = dict(measure_ranks(sites, device="cpu"))
    assert list(found) == [site.name for site in sites]
    for site in sites:
        every = torch.arange(site.group.units)
        rows = site.weight.detach().movedim(site.axis, 0)[site.indices(every)]
        assert found[site.name]["shape"] == list(rows.shape)
        assert found[site.name]["numerical_rank"] == torch.linalg.matrix_rank(rows)


def test_an_interrupted_run_goes_on_with_what_is_missing():
    sites = find_sites(tiny_llama())
    whole = dict(measure_ranks(sites))
    part = dict(zip(whole, [next(iter(whole.values()))], strict=False))
    rest = dict(measure_ranks(sites, done=part))
    assert {**part, **rest} == whole and len(rest) == len(whole) - 1


def test_growth_of_ranks_since_a_base():
    before = {"a": {"numerical_rank": 3, "entropy_rank": 2.5}}
    after = {"a": {"numerical_rank": 5, "entropy_rank": 4.0}, "b": before["a"]}
    assert rank_changes(after, before) == {"a": {"numerical_rank": 2, "entropy_rank": 1.5}}


def test_weights_that_are_not_finite_and_tolerances_out_of_range_are_refused():
    site = site_of(torch.full((3, 3), float("nan"), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"layer\.weight has 9 numbers that are not finite"):
        entry_of(site)
    with pytest.raises(ValueError, match="tolerance: got 1, allowed: from 0 to below 1"):
        entry_of(site, tolerance=1)


@pytest.mark.parametrize(
    ("name", "layer", "projection"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11, "q_proj"),
        ("transformer.h.0.attn.c_attn.weight[keys]", 0, "c_attn[keys]"),
        ("model.layers.3.mlp.up_proj.bias", 3, "up_proj.bias"),
        ("lm_head.weight", None, "lm_head"),
    ],
)
def test_names_tell_layer_and_projection(name, layer, projection):
    assert describe_weight(name) == {"layer": layer, "projection": projection}
