"""What is logged: names by side, unit and projection, and means over the layers."""

import pytest
import torch
from helpers import tiny_llama, tokens

from apex_composer import Expander, find_sites
from apex_composer.trainer.metrics import final_metrics, stage_metrics, step_metrics


@pytest.fixture(scope="module")
def expander() -> Expander:
    """After two stages' selections, with operators that do something."""
    model = tiny_llama(kv_heads=2, layers=3)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    for seed in range(2):
        with expander.assessing(), torch.no_grad():
            model(tokens(6, seed=seed))
        expander.begin_stage()
    for place, operator in enumerate(expander.operators):
        operator.unfold()
        torch.nn.init.normal_(operator.factors.left, std=0.1 + 0.01 * place)
        operator.fold()
    return expander


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_a_stages_metrics(expander):
    metrics = stage_metrics(expander)
    record = expander.history[-1]
    assert metrics.pop("apex/stage") == 1
    for place, side in enumerate(("advantageous", "disadvantageous")):
        for unit in ("head", "kv_head", "channel"):
            overlaps = [
                pair[place]
                for name, pair in record["overlap"].items()
                if name.endswith(f".{unit}s")
            ]
            assert len(overlaps) == 3
            assert metrics.pop(f"apex/overlap/{side}/{unit}") == pytest.approx(mean(overlaps))
    for unit in ("head", "channel"):
        own = {n: v for n, v in record["norm_std"].items() if n.endswith(f".{unit}s")}
        assert metrics.pop(f"apex/norm_std_mean/{unit}") == pytest.approx(mean(own.values()))
        for name, value in own.items():
            assert metrics.pop(f"apex/norm_std/{name}") == value > 0
    assert metrics == {}


def test_a_first_stages_metrics_have_no_overlap():
    model = tiny_llama()
    expander = Expander(find_sites(model), threshold=0.25, method="random")
    expander.begin_stage()
    assert stage_metrics(expander) == {"apex/stage": 0}


def test_a_steps_metrics(expander):
    metrics = step_metrics(expander, timed=False)
    assert metrics.pop("apex/stage") == 1
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.removeprefix("apex/operator_norm/") for name in metrics} == projections
    norms = expander.relative_norms()
    for projection in projections:
        own = [norm for name, norm in norms.items() if f".{projection}." in name]
        assert len(own) == 3 and min(own) > 0
        assert metrics[f"apex/operator_norm/{projection}"] == pytest.approx(mean(own))


def test_milliseconds_are_those_since_the_last_reading(expander):
    expander.stopwatch.running = True
    with expander.stopwatch.block(torch.device("cpu")):
        torch.randn(100).sum()
    assert step_metrics(expander)["apex/milliseconds_per_step"] > 0
    assert step_metrics(expander)["apex/milliseconds_per_step"] == 0


def test_the_end_of_a_run_reports_the_norms_since_its_last_stage_began():
    model = tiny_llama()
    expander = Expander(find_sites(model), threshold=0.25, method="random")
    expander.begin_stage()
    with expander.assessing(), torch.no_grad():
        model(tokens(6))
    metrics = final_metrics(expander)
    assert metrics["apex/stage"] == 0 and metrics["apex/operator_norm/q_proj"] == 0
    for name, totals in expander.assessment.totals().items():
        spread = totals.mean_norms().std(correction=0).item()
        assert metrics[f"apex/norm_std/{name}"] == pytest.approx(spread)
    spreads = [metrics[f"apex/norm_std/model.layers.{i}.mlp.channels"] for i in range(2)]
    assert metrics["apex/norm_std_mean/channel"] == pytest.approx(mean(spreads))


def test_a_plain_stage_has_no_operator_norms():
    expander = Expander(find_sites(tiny_llama()), threshold=0.25, method="random", expansion=False)
    expander.begin_stage()
    assert step_metrics(expander, timed=False) == {"apex/stage": 0}


def test_parts_of_a_fused_projection_are_told_apart(monkeypatch, expander):
    norms = {"blocks.0.attn.Wqkv.weight[keys]": 0.25, "blocks.1.attn.Wqkv.weight[keys]": 0.75}
    monkeypatch.setattr(expander, "relative_norms", lambda: norms)
    assert step_metrics(expander, timed=False)["apex/operator_norm/Wqkv[keys]"] == 0.5
