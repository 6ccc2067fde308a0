"""Norms and scores of an observation against sample-by-sample loops of their own, in float64."""

import math
import statistics

import pytest
import torch
from helpers import largest
from observed import (  # noqa: F401
    FAMILIES,
    assert_as_before,
    in_full_precision,
    make_samples,
    state_of,
    wide_model,
)

from apex_composer import find_sites
from apex_composer.observe.activations import (
    assessed_groups,
    collect_totals,
    describe_activations,
)

pytestmark = pytest.mark.numeric


def by_hand(model, groups, samples) -> dict[str, tuple[list[float], list[int]]]:
    """Mean norms and scores of eq. 3: every sample alone, without padding, unit by unit."""
    norms = {group.name: [0.0] * group.units for group, _ in groups}
    scores = {group.name: [0] * group.units for group, _ in groups}
    for sample in samples:
        seen = {}
        handles = [
            group.probe.register_forward_pre_hook(
                lambda _, inputs, name=group.name, seen=seen: seen.update({name: inputs[0]})
            )
            for group, _ in groups
        ]
        with torch.no_grad():
            model(input_ids=sample.tokens.unsqueeze(0))
        for handle in handles:
            handle.remove()
        for group, count in groups:
            activation = seen[group.name].reshape(len(sample.tokens), group.units, group.unit_size)
            own = [
                math.sqrt(sum(x * x for x in activation[:, unit].flatten().tolist()))
                for unit in range(group.units)
            ]
            top, bottom = largest(own, count), largest([-norm for norm in own], count)
            for unit, norm in enumerate(own):
                norms[group.name][unit] += norm / len(samples)
                scores[group.name][unit] += (unit in top) - (unit in bottom)
    return {name: (norms[name], scores[name]) for name in norms}


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_each_sample_alone(family):
    model, samples = wide_model(family), make_samples()
    before = state_of(model)
    groups = assessed_groups(find_sites(model), 0.25)
    totals = collect_totals(model, groups, samples, batch_size=3)
    found = describe_activations(groups, totals, "sequences")
    expected = by_hand(model, groups, samples)
    assert_as_before(model, before)
    assert found["samples"] == len(samples) and found["protocol"] == "sequences"
    assert found["groups"].keys() == expected.keys()
    assert [(g["unit"], g["layer"]) for g in found["groups"].values()] == [
        (unit, layer) for layer in (0, 1) for unit in ("head", "channel")
    ]
    for name, (norms, scores) in expected.items():
        group = found["groups"][name]
        assert group["mean_norm"] == pytest.approx(norms, rel=1e-11)
        assert group["score"] == scores, name
        # Averaged first, then the deviation (appendix A.1).
        assert group["std"] == pytest.approx(statistics.pstdev(norms), rel=1e-10)


def test_batch_sizes_and_orders_differ_by_rounding_alone():
    model, samples = wide_model("llama"), make_samples()
    groups = assessed_groups(find_sites(model), 0.25)
    first = collect_totals(model, groups, samples, batch_size=1)
    for size, order in ((2, samples), (7, samples[::-1])):
        second = collect_totals(model, groups, order, batch_size=size)
        for name, total in first.items():
            torch.testing.assert_close(second[name].norm_sums, total.norm_sums, rtol=1e-11, atol=0)
            assert torch.equal(second[name].scores, total.scores)


def test_packed_rows_count_as_one_sample():
    """A row that `prep` has laid end to end is one sample, whatever documents it holds."""
    model, samples = wide_model("llama"), make_samples()
    packed = [samples[0]._replace(tokens=torch.cat([s.tokens for s in samples[:3]]))]
    groups = assessed_groups(find_sites(model), 0.25)
    totals = collect_totals(model, groups, packed)
    expected = by_hand(model, groups, packed)
    for name, total in totals.items():
        assert total.samples == 1 and total.scores.tolist() == expected[name][1]


def test_an_error_leaves_no_hook_behind():
    model, samples = wide_model("llama"), make_samples()
    before = state_of(model)
    samples[3] = samples[3]._replace(tokens=torch.tensor([10**6]))
    with pytest.raises(IndexError):
        collect_totals(model, assessed_groups(find_sites(model), 0.25), samples)
    assert_as_before(model, before)


def test_norms_that_are_not_finite_are_refused():
    model, samples = wide_model("llama"), make_samples()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    groups = assessed_groups(find_sites(model), 0.25)
    totals = collect_totals(model, groups, samples)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.channels are not finite.*--dtype"):
        describe_activations(groups, totals, "sequences")
