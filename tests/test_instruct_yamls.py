"""The YAMLs of instruction tuning: the settings of the paper, and two batches on a tiny model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chats import instruct, tokenizer_folder, tulu_line, write_records
from composer_run import assert_same_weights
from llmfoundry.command_utils import train_from_yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_yamls import NAMES_AND_FOLDERS, differing
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

TESTS = Path(__file__).parent
YAMLS = TESTS.parent / "yamls" / "instruct"
MODELS = {"llama2_7b": (2.0e-5, 0.024), "llama31_8b": (5.0e-6, 0.021)}
MODES = ("half", "selected")
LOADERS = ("train_loader", "eval_loader")
LENGTH = 128
# The tiny model's nearest to what is 2.4 % of a large one.
IN_SMALL = {"half": 0.52, "selected": 0.26}


def load(name: str, mode: str = "half") -> dict:
    """A YAML as llm-foundry sees it."""
    config = OmegaConf.load(YAMLS / f"{name}.yaml")
    if name.endswith("apex"):
        config.variables.trainable = mode
    config = OmegaConf.to_container(config, resolve=True)
    del config["variables"]
    return config


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_are_the_papers(model):
    lr, selected = MODELS[model]
    for mode, share, epochs in (("half", 0.52, 2), ("selected", selected, 3)):
        config = load(f"{model}_apex", mode)
        apex = config["algorithms"]["apex"]
        assert (apex["trainable"], apex["trainable_share"]) == (mode, share)
        assert apex.get("threshold") == {"half": 0.1875, "selected": None}[mode]
        assert apex["stages"] == ["1ep"] * epochs and config["max_duration"] == f"{epochs}ep"
        assert config["optimizer"]["lr"] == lr
        assert (config["max_seq_len"], config["global_train_batch_size"]) == (8192, 128)
        assert config["model"]["master_weights_dtype"] == {"half": None, "selected": "bf16"}[mode]


@pytest.mark.parametrize("model", MODELS)
def test_apex_and_full_fine_tuning_differ_in_what_is_trained_only(model):
    apex, full = load(f"{model}_apex"), load(f"{model}_full")
    assert apex["algorithms"].pop("apex")
    assert apex["model"].pop("master_weights_dtype") is None
    assert differing(apex, full) == NAMES_AND_FOLDERS


@pytest.mark.parametrize("kind", ["apex", "full"])
def test_the_models_differ_in_learning_rate_context_and_names_only(kind):
    small, large = (load(f"{model}_{kind}") for model in MODELS)
    assert small["model"].pop("config_overrides") == {"max_position_embeddings": 8192}
    names = NAMES_AND_FOLDERS | {"model.pretrained_model_name_or_path"}
    assert differing(small, large) == names | {"optimizer.lr"}


@pytest.fixture(scope="module", autouse=True)
def left_as_found() -> Iterator[None]:
    """llm-foundry begins a distributed run, of one rank, in this process."""
    environment, begun = dict(os.environ), distributed.is_initialized()
    yield
    os.environ.clear()
    os.environ.update(environment)
    if distributed.is_initialized() and not begun:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Tiny Llamas named like the YAMLs, and in `data` what prep-instruct makes of chats."""
    folder = tmp_path_factory.mktemp("instruct")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    # As the real ones: all heads have KV heads and the context is short, or neither.
    for name, kv_heads, context in (("llama2_7b", 16, LENGTH // 2), ("llama31_8b", 8, LENGTH)):
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


def arguments(name: str, mode: str, inputs: Path, runs: Path, **changed) -> list[str]:
    """A YAML and what makes of it a run of two small batches on a CPU."""
    overrides = {
        "variables.model": inputs / name.rpartition("_")[0],
        "variables.data": inputs / "data",
        "variables.runs": runs,
        "variables.attention": "sdpa",  # flash_attention_2 needs a GPU
        "max_seq_len": LENGTH,
        "global_train_batch_size": 4,
        "device_train_microbatch_size": 2,
        "precision": "fp32",  # the only one that Composer has on CPUs
        "callbacks.start_guard.margin": "null",  # the weights are random
        "callbacks.heartbeat": "null",
        "optimizer.lr": 1e-2,  # seen in bf16, in which the model is exported
        "log_to_console": "false",
        "python_log_level": "null",
    }
    for loader in LOADERS:
        overrides |= {
            f"{loader}.num_workers": 0,
            f"{loader}.prefetch_factor": "null",
            f"{loader}.persistent_workers": "false",
            f"{loader}.dataset.hf_kwargs.cache_dir": inputs / "cache",
        }
    if name.endswith("apex"):
        overrides |= {
            "variables.trainable": mode,
            f"variables.{mode}.max_duration": "2ba",
            f"variables.{mode}.apex.stages": "[1ba,1ba]",
            f"variables.{mode}.apex.trainable_share": IN_SMALL[mode],
        }
    else:
        overrides["max_duration"] = "2ba"
    overrides |= {key.replace("__", "."): value for key, value in changed.items()}
    return [str(YAMLS / f"{name}.yaml"), *(f"{key}={value}" for key, value in overrides.items())]


def train(name: str, mode: str, inputs: Path, runs: Path, **changed) -> Path:
    """Train two batches in this process; returns the run's folder."""
    yaml, *overrides = arguments(name, mode, inputs, runs, **changed)
    trainer = train_from_yaml(yaml, overrides)
    trainer.close()
    return runs / trainer.state.run_name


def changed_weights(run: Path, untrained: Path) -> tuple[dict[str, int], int]:
    """How many entries of each exported weight are not those of the base model, and of how many."""
    base = LlamaForCausalLM.from_pretrained(untrained, torch_dtype=torch.bfloat16).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(run / "huggingface/final", torch_dtype="auto")
    tuned = tuned.state_dict()
    assert base.keys() == tuned.keys() and {w.dtype for w in tuned.values()} == {torch.bfloat16}
    changed = {name: int((tuned[name] != weight).sum()) for name, weight in base.items()}
    return changed, sum(weight.numel() for weight in base.values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["full", *MODES])
def test_the_yaml_trains_a_tiny_model_on_what_prep_instruct_writes(model, mode, inputs, tmp_path):
    name = f"{model}_{'full' if mode == 'full' else 'apex'}"
    run = train(name, mode, inputs, tmp_path)
    changed, total = changed_weights(run, inputs / model)
    whole = {key for key in changed if "embed_tokens" in key or "lm_head" in key}
    norms = {key for key in changed if "norm" in key}
    rows = set(changed) - whole - norms
    trained = {"full": rows | whole | norms, "half": rows | whole, "selected": rows}[mode]
    assert {key for key, count in changed.items() if count} == trained
    # Two stages, each with rows of its own.
    share = sum(changed.values()) / total
    assert share > 0.9 if mode == "full" else 0.5 * IN_SMALL[mode] < share < 2 * IN_SMALL[mode]


def train_sharded(name: str, mode: str, inputs: Path, runs: Path, **changed) -> Path:
    """Train two batches on two ranks with FSDP2; returns the run's folder."""
    given = arguments(name, mode, inputs, runs, **changed, device_train_microbatch_size=1)
    done = subprocess.run(
        [sys.executable, str(TESTS / "instruct_worker.py"), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS), "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (run,) = runs.iterdir()
    return run


def rewound(run: Path, folder: Path) -> None:
    """A copy of a finished run as it was after its first batch."""
    copy = Path(shutil.copytree(run, folder / run.name, symlinks=True))
    shutil.rmtree(copy / "huggingface")
    for path in (copy / "checkpoints").iterdir():
        if path.is_symlink():
            target = os.readlink(path).replace("ba2", "ba1")
            path.unlink()
            path.symlink_to(target)
        elif "ba2" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("training", "mode"),
    [
        (train, "selected"),
        *(pytest.param(train_sharded, mode, marks=pytest.mark.long) for mode in ("full", *MODES)),
    ],
)
def test_the_same_command_goes_on_from_the_last_checkpoint(training, mode, inputs, tmp_path):
    name = "llama2_7b_full" if mode == "full" else "llama2_7b_apex"
    first = training(name, mode, inputs, tmp_path / "first", save_interval="1ba")
    rewound(first, tmp_path / "second")
    second = training(name, mode, inputs, tmp_path / "second", save_interval="1ba")
    # What it had is still what it had: it has not begun anew.
    times = [
        {p.name: p.stat().st_mtime_ns for p in (run / "checkpoints").glob("*ba1*")}
        for run in (first, second)
    ]
    weights = [load_file(run / "huggingface/final/model.safetensors") for run in (first, second)]
    assert times[0] == times[1] and times[0]
    assert_same_weights(*weights)


def test_the_exported_model_chats(inputs, tmp_path):
    """As docs/instruct.md says."""
    run = train("llama2_7b_apex", "half", inputs, tmp_path)
    chat = pipeline("text-generation", model=str(run / "huggingface/final"))
    answer = chat([{"role": "user", "content": "How many heads?"}], max_new_tokens=3)
    assert [message["role"] for message in answer[0]["generated_text"]] == ["user", "assistant"]
    assert "<|assistant|>" in chat.tokenizer.chat_template


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"train_loader__dataset__packing_ratio": "auto"}, "packing_ratio: got auto"),
        ({"max_seq_len": LENGTH // 2}, "longest example has"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_read(changed, told, inputs, tmp_path):
    cache = {f"{name}__dataset__hf_kwargs__cache_dir": tmp_path / "cache" for name in LOADERS}
    with pytest.raises(ValueError, match=told):
        train("llama31_8b_full", "full", inputs, tmp_path, **cache, **changed)
    assert not list(tmp_path.iterdir())
