"""A YAML of instruction tuning as two batches on a tiny model, in this process."""

from pathlib import Path
from typing import Any

import torch
from chats import instruct, tokenizer_folder, tulu_line, write_records
from llmfoundry.command_utils import train as train_configuration
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apex_composer.tools.training_yaml import load_configuration
from apex_composer.tools.yaml_defaults import read_yaml

YAMLS = Path(__file__).parents[1] / "yamls"
MODELS = ("llama2_7b", "llama31_8b")
LOADERS = ("train_loader", "eval_loader")
LENGTH = 128
# The tiny model's nearest to what is 2.4 % of a large one.
IN_SMALL = {"half": 0.52, "selected": 0.26}


def runs_of(folder: str) -> list[str]:
    """Paths below yamls/, without .yaml, of the LLaMA runs in a folder."""
    return sorted(f"{folder}/{path.stem}" for path in (YAMLS / folder).glob("llama*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A YAML as llm-foundry sees it."""
    config = load_configuration(YAMLS / f"{name}.yaml")
    del config["variables"]
    return config


def model_of(name: str) -> str:
    return next(model for model in MODELS if f"/{model}_" in name)


def method_of(name: str) -> str:
    return name.partition(f"{model_of(name)}_")[2]


def write_inputs(folder: Path) -> Path:
    """Tiny Llamas named like the YAMLs, and in `data` what prep-instruct makes of chats."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    # As the real ones: all heads have KV heads and the context is short, or neither.
    for name, kv_heads, context in zip(MODELS, (16, 8), (LENGTH // 2, LENGTH), strict=True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=16,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    write_records(folder / "tulu.jsonl", [tulu_line(number) for number in range(40)])
    instruct(folder / "tulu.jsonl", folder / "data")
    return folder


def arguments(name: str, inputs: Path, runs: Path, **changed: Any) -> list[str]:
    """A YAML and what makes of it a run of two small batches on a CPU."""
    overrides = {
        "variables.model": inputs / model_of(name),
        "variables.data": inputs / "data",
        "variables.runs": runs,
        "variables.attention": "sdpa",  # flash_attention_2 needs a GPU
        "max_duration": "2ba",
        "max_seq_len": LENGTH,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 2,
        "precision": "fp32",  # the only one that Composer has on CPUs
        "callbacks.start_guard.margin": "null",  # the weights are random
        "callbacks.heartbeat": "null",
        "optimizer.lr": 1e-2,  # seen in bf16, in which the model is exported
        "log_to_console": "false",
        "python_log_level": "null",
        **in_small(load(name)),
    }
    for loader in LOADERS:
        overrides |= {
            f"{loader}.num_workers": 0,
            f"{loader}.prefetch_factor": "null",
            f"{loader}.persistent_workers": "false",
            f"{loader}.dataset.hf_kwargs.cache_dir": inputs / "cache",
        }
    overrides |= {key.replace("__", "."): value for key, value in changed.items()}
    return [str(YAMLS / f"{name}.yaml"), *(f"{key}={value}" for key, value in overrides.items())]


def in_small(config: dict[str, Any]) -> dict[str, Any]:
    """What a method's settings are for two batches on a model of a few weights."""
    methods, small = config["algorithms"], {}
    if "apex" in methods:
        asked = methods["apex"]["trainable_share"]
        share = IN_SMALL[methods["apex"]["trainable"]] if asked != 0.525 else 0.64
        small = {"stages": "[1ba,1ba]", "trainable_share": share}
        small = {f"algorithms.apex.{key}": value for key, value in small.items()}
    if "s2ft" in methods:
        small["algorithms.s2ft.trainable_share"] = IN_SMALL["selected"]
    if "relora" in methods:
        small |= {"algorithms.relora.interval": "1ba", "algorithms.relora.t_warmup": "0ba"}
    if "peft_config" in config["model"]:
        small["model.peft_config.r"] = 4
    return small


def train(name: str, inputs: Path, runs: Path, **changed: Any) -> Path:
    """Train two batches in this process; returns the run's folder."""
    yaml, *overrides = arguments(name, inputs, runs, **changed)
    trainer = train_configuration(read_yaml(Path(yaml), overrides))
    trainer.close()
    assert trainer.state.timestamp.batch == 2
    return runs / trainer.state.run_name
