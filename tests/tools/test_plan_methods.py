"""`apex-composer plan` on what is frozen, on adapters, and on other methods than APEX."""

import json

import pytest
from tinyllama import lines_of, run_of

from apex_composer.tools.plan import make_plan

pytestmark = pytest.mark.usefixtures("roomy_disk")

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 64, "target_modules": "all-linear"}
# The sum of both sides of all 22 layers' matrices (queries, output; keys, values; FFN).
ADAPTERS = 64 * 22 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632))
ALL = 1_100_048_384


def test_what_is_frozen_costs_less(model, tmp_path):
    whole = make_plan(run_of({}, model), 1)
    lora = make_plan(run_of({}, model, peft_config=LORA), 1)
    assert 0.6 < lora.flops.per_token / whole.flops.per_token < 0.8
    half = make_plan(run_of({"hft": {"share": 0.5, "seed": 3}}, model), 1)
    frozen = whole.trained - half.trained - 22 * 2048  # one of two norms in each layer
    assert half.flops.per_token == whole.flops.per_token - 2 * frozen
    selected = make_plan(run_of({"apex": {"trainable": "selected"}}, model), 1)
    # Embeddings, head and norms are frozen, and keys and values, of which nothing is selected.
    assert whole.flops.per_token - selected.flops.per_token == 2 * (
        2048 * 32000 + 22 * 2 * 2048 * 256 + 2048 * (2048 + 2 * 256)
    )


def test_an_unknown_architecture_has_no_hours(model, tmp_path):
    sizes = {"n_layer": 1, "n_head": 2, "hidden_size": 8, "model_type": "bloom", "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = run_of({}, model, pretrained_model_name_or_path=str(tmp_path), config_overrides=None)
    plan = make_plan(config, 1)
    assert plan.problems == [] and plan.flops is None
    table = lines_of(plan)
    assert "not known, so no hours: no sites to expand in BloomForCausalLM" in table


def in_bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


@pytest.mark.parametrize(
    ("whole", "saved"), [(False, 12 * ADAPTERS), (True, 4 * ALL + 12 * ADAPTERS)]
)
def test_adapters_are_counted(model, whole, saved):
    settings = {"peft_config": LORA, "should_save_peft_only": not whole}
    config = run_of({}, model, **settings)
    config["callbacks"].pop("hf_checkpointer")
    plan = make_plan(config, 1)
    assert plan.problems == []
    assert (plan.trained, plan.parameters) == (ADAPTERS, ALL + ADAPTERS)
    assert plan.checkpoints.size == saved
    table = lines_of(plan)
    assert f"{ADAPTERS:,} of {ALL + ADAPTERS:,}" in table
    assert in_bytes(4 * ALL + 16 * ADAPTERS) + " on each GPU" in table


def test_what_start_guard_refuses_of_adapters_is_a_problem(model):
    config = run_of({"relora": {"interval": "10ba"}}, model, peft_config=LORA)
    (told,) = make_plan(config, 1).problems
    assert "should_save_peft_only: got true with algorithms: relora" in told


def test_what_hft_cannot_be_on_is_told_once(model):
    (told,) = make_plan(run_of({"hft": {}}, model, peft_config=LORA), 1).problems
    assert "q_proj.base_layer holds a matrix that is neither" in told


def test_half_of_the_matrices_has_no_gradients(model):
    plan = make_plan(run_of({"hft": {"share": 0.5, "seed": 3}}, model), 1)
    assert 0.5 < plan.trained / ALL < 0.6
    assert plan.checkpoints.size == 4 * ALL + 8 * plan.trained


def test_s2ft_trains_rows_without_operators(model):
    config = run_of({"s2ft": {"trainable_share": 0.05}}, model, master_weights_dtype="bf16")
    plan = make_plan(config, 1)
    assert plan.problems == [] and plan.cost.parameters == plan.cost.memory == 0
    assert plan.checkpoints.size == 2 * ALL + 12 * plan.trained
    table = lines_of(plan)
    assert f"trained {plan.trained:,} of {ALL:,}" in table
    assert "operators" not in table.partition("units selected")[0].partition("run")[2]
    assert "APEX adds" not in table
    config["algorithms"]["s2ft"]["projections"] = "output"
    assert make_plan(config, 1).cost.sites == 44


@pytest.mark.parametrize("method", ["hft", "rmt", "gmt", "s2ft", "act_regu", "relora", "ema"])
def test_settings_of_all_methods_are_checked(model, method):
    (told,) = make_plan(run_of({method: {"shaer": 0.5}}, model), 1).problems
    assert "shaer" in told
