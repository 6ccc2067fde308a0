"""Masks against zeroed columns, chosen units against sorting by hand, and the model afterwards."""

from copy import deepcopy

import pytest
import torch
from observed import (  # noqa: F401
    FAMILIES,
    assert_as_before,
    in_full_precision,
    make_samples,
    state_of,
    wide_model,
)

from apex_composer import find_sites
from apex_composer.assessment.scores import GroupTotals
from apex_composer.model.sites import Group
from apex_composer.observe.activations import assessed_groups, collect_totals
from apex_composer.observe.masking import (
    choose_all_masked,
    choose_masked,
    count_masked,
    describe_masking,
    masked,
    measure_masked,
)
from apex_composer.observe.predictions import predict

pytestmark = pytest.mark.numeric


def groups_of(model) -> list[Group]:
    return [group for group, _ in assessed_groups(find_sites(model), 0.25)]


def without_columns(model, hidden):
    """A copy whose output projections have zeros where the masked units come in."""
    copy = deepcopy(model)
    with torch.no_grad():
        for site in find_sites(copy):
            if site.module is site.group.probe and site.group.name in hidden:
                units = hidden[site.group.name].nonzero().flatten()
                site.weight.index_fill_(site.axis, site.indices(units), 0)
    return copy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["top", "lowest", "random"])
def test_a_mask_is_what_zeroed_columns_are(family, which):
    model, samples = wide_model(family), make_samples()
    before = state_of(model)
    groups = assessed_groups(find_sites(model), 0.25)
    totals = collect_totals(model, groups, samples)
    units = [group for group, _ in groups]
    hidden = choose_all_masked(units, totals, which, 0.25)
    assert count_masked(units, hidden) == {"heads": 2, "channels": 2 * units[1].units // 4}
    ids = samples[0].tokens.unsqueeze(0)
    with torch.no_grad():
        expected = without_columns(model, hidden)(input_ids=ids).logits
        whole = model(input_ids=ids).logits
        with masked(units, hidden):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert (found - whole).abs().max() > 1e-3  # it does something
        assert torch.equal(model(input_ids=ids).logits, whole)
    assert_as_before(model, before)


def test_numbers_are_the_units_of_sorting_by_hand():
    group = Group("layer.channels", "channel", 8, 1, torch.nn.Linear(8, 1))
    norms = torch.tensor([3.0, 1.0, 7.0, 1.0, 7.0, 7.0, 0.0, 2.0])
    for share, count in ((0.1, 1), (0.25, 2), (0.31, 2), (0.3125, 3), (1.0, 8)):
        ranked = sorted(range(8), key=lambda unit: -norms[unit])
        top = choose_masked(group, norms, "top", share, 0)
        assert set(top.nonzero().flatten().tolist()) == set(ranked[:count])
        ranked = sorted(range(8), key=lambda unit: norms[unit])
        lowest = choose_masked(group, norms, "lowest", share, 0)
        assert set(lowest.nonzero().flatten().tolist()) == set(ranked[:count])
    assert not choose_masked(group, norms, "top", 0.05, 0).any()


def test_random_masks_are_named_by_their_seed():
    groups = [
        Group(f"layer.{i}.channels", "channel", 64, 1, torch.nn.Linear(64, 1)) for i in range(2)
    ]
    none = torch.zeros(64)

    def draw(group, share, seed):
        return choose_masked(group, none, "random", share, seed)

    first = draw(groups[0], 0.25, 17)
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(draw(groups[0], 0.25, 17), first) and int(first.sum()) == 16
    assert not torch.equal(draw(groups[0], 0.25, 18), first)
    assert not torch.equal(draw(groups[1], 0.25, 17), first)
    assert not (first & ~draw(groups[0], 0.5, 17)).any()  # sets grow with the share


def test_what_units_are_ranked_by():
    group = Group("g", "channel", 4, 1, torch.nn.Linear(4, 1))
    totals = {"g": GroupTotals(torch.tensor([0, 5, 1, -2]), torch.tensor([9.0, 1.0, 2.0, 3.0]), 3)}
    for mask_by, expected in (("average", [True, False, False, False]), ("rank", [0, 1, 0, 0])):
        hidden = choose_all_masked([group], totals, "top", 0.25, mask_by=mask_by)
        assert hidden["g"].tolist() == list(map(bool, expected))
    with pytest.raises(ValueError, match=r"--mask 0.01 masks nothing.*0.125 to 1"):
        choose_all_masked([group], totals, "top", 0.01)


def test_an_error_inside_takes_the_mask_off():
    model = wide_model("gpt2")
    before, groups = state_of(model), groups_of(model)
    hidden = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    with pytest.raises(KeyError), masked(groups, hidden):
        raise KeyError
    del hidden[groups[-1].name]
    with pytest.raises(KeyError), masked(groups, hidden):  # while hooks are put on
        pass
    assert_as_before(model, before)


def test_a_row_of_the_table():
    model, samples = wide_model("llama"), make_samples(answers=True)
    groups = groups_of(model)
    hidden = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    whole = predict(model, {"all": samples})
    found = measure_masked(model, {"all": samples}, groups, hidden, batch_size=2)
    row = describe_masking(found, whole)
    # Without any unit only the embeddings are left.
    expected = predict(without_columns(model, hidden), {"all": samples})
    assert row["loss"] == pytest.approx(expected.mean_loss().loss, rel=1e-11)
    assert row["loss_change"] == pytest.approx(row["loss"] - whole.mean_loss().loss, rel=1e-9)
    assert row["exact_match"] == expected.exact.double().mean()
    same = describe_masking(whole, whole)
    assert same["loss_change"] == same["loss_change_error"] == 0.0
    assert same["standard_error"] > 0 and row["loss_change_error"] > 0
