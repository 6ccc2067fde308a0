import pytest
import torch
from reproduce.arms import Arm
from reproduce.stage_facts import (
    masked_losses,
    mean_loss,
    norm_facts,
    operator_facts,
    overlap_facts,
)
from tiny_arms import start, train_stage

from apex_composer.ops.monarch import to_dense


@pytest.fixture(scope="module")
def started():
    found = start(Arm("apex_rank", apex={}))
    train_stage(found, 0, 5)
    return found


def test_masking_a_unit_that_hands_on_nothing_costs_nothing():
    found = start(Arm("vanilla"))
    batches = [found.order.batch(place) for place in range(2)]
    with torch.no_grad():  # the first head of every layer, and 5 channels
        for layer in found.model.model.layers:
            layer.self_attn.v_proj.weight[:4] = 0
            layer.mlp.up_proj.weight[:5] = 0
    losses = masked_losses(found.model, batches, seed=1)
    assert losses["whole"] == mean_loss(found.model, batches) == losses["lowest"]
    assert losses["top"] != losses["whole"] != losses["random"]
    assert losses["heads"] == 2 and losses["channels"] == 10
    assert not any(module._forward_pre_hooks for module in found.model.modules())


def test_norms_are_means_over_layers_by_kind_of_unit(started):
    with started.varied.assessing():
        started.model(input_ids=started.order.batch(0)[:, :-1])
    totals = started.varied.expander.assessment.totals()
    found = norm_facts(totals)["norms"]
    assert set(found) == {"heads", "channels"}
    layers = [total.mean_norms() for name, total in totals.items() if name.endswith("heads")]
    assert len(layers) == 2
    assert found["heads"]["mean"] == pytest.approx(float(torch.stack(layers).mean()))
    deviation = torch.stack([norms.std(correction=0) for norms in layers]).mean()
    assert found["heads"]["std"] == pytest.approx(float(deviation))


def test_overlaps_are_means_over_layers_of_both_sides():
    record = {"overlap": {"a.heads": [1.0, 0.0], "b.heads": [0.5, 0.5], "a.channels": [0.2, 0.4]}}
    assert overlap_facts(record) == {
        "overlap": {
            "heads": {"advantageous": 0.75, "disadvantageous": 0.25},
            "channels": {"advantageous": 0.2, "disadvantageous": 0.4},
        }
    }
    assert overlap_facts({"overlap": {}}) == {}


def test_operators_by_kind_of_site_and_as_a_mean(started):
    found = operator_facts(started.varied.expander)
    operators = started.varied.expander.operators
    norms = [float(operator.relative_norm()) for operator in operators]
    assert found["relative_norm"] == pytest.approx(sum(norms) / len(norms))
    gates = [operator for operator in operators if "gate_proj" in operator.site.name]
    assert len(gates) == 2
    ranks = []
    for gate in gates:
        values = torch.linalg.svdvals(to_dense(gate.factors))
        shares = values / values.sum()
        ranks.append(float((-(shares * shares.log()).sum()).exp()))
    assert found["operators"]["gate_proj"]["effective_rank"] == pytest.approx(sum(ranks) / 2)
    assert 1 < found["effective_rank"] < 6


def test_without_operators_there_is_nothing_to_say_of_them():
    found = start(Arm("selection_only", apex={"expansion": False}))
    train_stage(found, 0, 1)
    assert found.ended == [{}]
