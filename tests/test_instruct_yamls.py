"""The YAMLs of instruction tuning: the settings of the paper, and what two of them differ in."""

import pytest
import torch
from instruct_run import MODELS, YAMLS, load, runs_of
from peft import LoraConfig, get_peft_model
from test_yamls import NAMES_AND_FOLDERS, differing, flatten
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer.callbacks.start_guard import StartGuard
from apex_composer.methods.hft import HFT
from apex_composer.tools.model_size import find_trained

LEARNING_RATES = {"llama2_7b": 2.0e-5, "llama31_8b": 5.0e-6}
SHARES = {"llama2_7b": 0.024, "llama31_8b": 0.021}
SHAPES = {
    "llama2_7b": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
    "llama31_8b": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
}
# What a method has and the first of its table has not, or otherwise.
HALF = {
    "full": set(),
    "hft": {"algorithms.hft"},
    "rmt": {"algorithms.rmt"},
    "gmt": {"algorithms.gmt"},
    "apex": {"algorithms.apex"},
}
SHARDED = "fsdp_config.state_dict_type"  # of all but the checkpoints of adapters only
ROWS = {"model.peft_config", "model.master_weights_dtype", SHARDED}
WHOLE = {"model.should_save_peft_only", "callbacks.hf_checkpointer", SHARDED}
PEFT = {
    "lora": set(),
    "dora": {"model.peft_config.use_dora", "fsdp_config.mixed_precision.param_dtype"},
    "rslora": {"model.peft_config.use_rslora", "model.peft_config.lora_alpha"},
    "pissa": {"model.peft_config.init_lora_weights", "model.peft_config.lora_dropout", *WHOLE},
    "relora": {"algorithms.relora", *WHOLE},
    "s2ft": {"algorithms.s2ft", *ROWS},
    "apex_selected": {"algorithms.apex", *ROWS},
}


def take(config: dict, path: str):
    """Remove a setting by its dotted path; returns what it was, None where it was not."""
    *sections, last = path.split(".")
    for section in sections:
        config = config.get(section, {})
    return config.pop(last, None)


def assert_differ(first: dict, second: dict, paths: set[str]) -> None:
    """Two runs differ in the settings named, in all of them, and in names and folders only."""
    for path in paths:
        assert take(first, path) != take(second, path), path
    left = flatten(first) | flatten(second)
    assert differing(first, second) == {name for name in NAMES_AND_FOLDERS if name in left}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("table", [HALF, PEFT])
def test_the_methods_of_a_table_differ_in_the_method_and_names_only(model, table):
    first = next(iter(table))
    for method, paths in table.items():
        if method != first:
            runs = (load(f"instruct/{model}_{name}") for name in (method, first))
            assert_differ(*runs, paths)


def test_every_file_is_of_a_table():
    expected = {f"instruct/{model}_{method}" for model in MODELS for method in (*HALF, *PEFT)}
    assert set(runs_of("instruct")) == expected
    assert {f"instruct/{path.stem}" for path in (YAMLS / "instruct").glob("*.yaml")} == expected


@pytest.mark.parametrize("name", runs_of("instruct") + runs_of("ablation"))
def test_a_run_is_named_like_its_file_which_says_how_it_starts(name):
    stem = name.partition("/")[2]
    assert load(name)["run_name"] == stem.replace("llama31", "llama3.1").replace("_", "-")
    text = (YAMLS / f"{name}.yaml").read_text()
    assert (
        f"\n#   FSDP_VERSION=2 composer train.py yamls/{name}.yaml variables.data=data/tulu" in text
    )


@pytest.mark.parametrize("name", runs_of("instruct") + runs_of("ablation"))
def test_the_guard_of_a_run_lets_it_start(name):
    """On one rank llm-foundry leaves fsdp_config out, and the guard does not see it."""
    StartGuard(train_config=load(name))


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_are_the_papers(model):
    for method in (*HALF, *PEFT):
        config = load(f"instruct/{model}_{method}")
        assert (config["max_seq_len"], config["global_train_batch_size"]) == (8192, 128)
        assert config["max_duration"] == ("2ep" if method in HALF else "3ep")
        assert config["optimizer"]["lr"] == (LEARNING_RATES[model] if method in HALF else 1e-4)
        apex = config["algorithms"].get("apex")
        if apex is not None:
            half = method == "apex"
            assert apex["trainable"] == ("half" if half else "selected")
            assert apex["trainable_share"] == (0.52 if half else SHARES[model])
            assert apex.get("threshold") == (0.1875 if half else None)
            assert apex["stages"] == ["1ep"] * (2 if half else 3)
    assert config["model"]["master_weights_dtype"] == "bf16"  # apex_selected
    masks = [load(f"instruct/{model}_{name}")["algorithms"][name] for name in ("rmt", "gmt")]
    assert masks == [{"share": 0.6}] * 2
    assert load(f"instruct/{model}_hft")["algorithms"]["hft"] == {"share": 0.5}
    assert load(f"instruct/{model}_s2ft")["algorithms"]["s2ft"] == {
        "trainable_share": SHARES[model]
    }


@pytest.mark.parametrize("model", MODELS)
def test_lora_of_rank_64_has_the_papers_share_of_the_parameters(model):
    settings = load(f"instruct/{model}_lora")["model"]["peft_config"]
    assert settings["r"] == 64
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**SHAPES[model]))
        total = llama.num_parameters()
        trained = get_peft_model(llama, LoraConfig(**settings)).num_parameters(only_trainable=True)
    assert round(trained / total, 3) == SHARES[model]


@pytest.mark.parametrize(("model", "share"), [("llama2_7b", 0.52), ("llama31_8b", 0.57)])
def test_hft_trains_what_its_file_says(model, share):
    hft = HFT(**load(f"instruct/{model}_hft")["algorithms"]["hft"])
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**SHAPES[model]))
    assert round(sum(find_trained(llama, hft, 17).values()) / llama.num_parameters(), 2) == share
    text = (YAMLS / "instruct/common/hft.yaml").read_text()
    assert f"{share:.0%} of LLaMA".replace("%", " %") in text


@pytest.mark.parametrize("method", [*HALF, *PEFT])
def test_the_models_differ_in_learning_rate_context_share_and_names_only(method):
    small, large = (load(f"instruct/{model}_{method}") for model in MODELS)
    assert take(small, "model.config_overrides") == {"max_position_embeddings": 8192}
    changes = {"model.pretrained_model_name_or_path"}
    if method in HALF:
        changes.add("optimizer.lr")
    elif method in ("s2ft", "apex_selected"):
        changes.add(f"algorithms.{method.removesuffix('_selected')}.trainable_share")
    assert_differ(small, large, changes)
