"""The YAMLs of the paper's ablations: each differs from the run that it belongs to in one thing."""

import pytest
from instruct_run import YAMLS, load, runs_of
from test_instruct_yamls import assert_differ
from test_yamls import load as load_tinyllama

APEX, S2FT = "instruct/llama2_7b_apex", "instruct/llama2_7b_s2ft"
STAGES = (1, 2, 3, 4)
# The run that each belongs to, and the values in which it differs.
ABLATIONS = {
    "without_expansion": (APEX, {"expansion": False}),
    "without_assessment": (APEX, {"assessment": {"method": "random"}}),
    "average_assessment": (APEX, {"assessment": {"method": "average"}}),
    "threshold_0": (APEX, {"threshold": 0.0}),
    "threshold_6.25": (APEX, {"threshold": 0.0625}),
    "threshold_12.5": (APEX, {"threshold": 0.125}),
    "threshold_25": (APEX, {"threshold": 0.25, "trainable_share": 0.525}),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_differs_in_what_it_says_only(ablation):
    base, changed = ABLATIONS[ablation]
    config = load(f"ablation/llama2_7b_{ablation}")
    apex = config["algorithms"]["apex"]
    assert {key: apex[key] for key in changed} == changed
    assert_differ(config, load(base), {f"algorithms.apex.{key}" for key in changed})


def test_activations_are_regularised_beside_s2ft():
    assert_differ(load("ablation/llama2_7b_act_regu"), load(S2FT), {"algorithms.act_regu"})


def test_the_sweep_goes_up_in_steps_of_two_heads():
    names = [f"ablation/llama2_7b_{name}" for name in ABLATIONS if name.startswith("threshold")]
    thresholds = {load(name)["algorithms"]["apex"]["threshold"] for name in (*names, APEX)}
    assert thresholds == {step * 2 / 32 for step in range(5)}


@pytest.mark.parametrize("stages", STAGES)
def test_stages_differ_in_number_and_learning_rates_only(stages):
    config, base = (
        load_tinyllama(f"ablation/tinyllama_stages_{stages}"),
        load_tinyllama("tinyllama_apex"),
    )
    assert config["variables"].pop("stages") == stages and base["variables"].pop("stages")
    rates = [config["optimizer"]["lr"] * k for k in config["scheduler"]["lr_multipliers"]]
    assert rates == pytest.approx([1e-4, 4e-5, 1e-5, 5e-6][:stages])
    batches = int(config["max_duration"].removesuffix("ba"))
    assert batches % stages == 0
    tokens = batches * config["global_train_batch_size"] * config["max_seq_len"]
    assert 9.99e9 < tokens <= 10e9  # what prep writes
    paths = {"max_duration", "scheduler.stages", "algorithms.apex.stages"}
    paths |= {"scheduler.lr_multipliers"} if stages != 3 else set()
    assert_differ(config, base, paths)


def test_every_file_is_of_a_table():
    names = {*(f"llama2_7b_{name}" for name in (*ABLATIONS, "act_regu"))}
    assert set(runs_of("ablation")) == {f"ablation/{name}" for name in names}
    names |= {f"tinyllama_stages_{number}" for number in STAGES}
    assert {path.name for path in (YAMLS / "ablation").glob("*.yaml")} == {
        f"{name}.yaml" for name in names
    }
