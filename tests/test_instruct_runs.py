"""Every YAML of instruction tuning and its ablations trains two batches of a tiny model."""

import os
import re
import shutil
from pathlib import Path

import instruct_run
import pytest
import torch
from composer_run import assert_same_weights
from instruct_run import (
    IN_SMALL,
    LENGTH,
    LOADERS,
    arguments,
    load,
    method_of,
    model_of,
    runs_of,
    train,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline
from worker_processes import run_script

TESTS = Path(__file__).parent
MODES = {"full": "full", "half": "apex", "selected": "apex_selected"}
# What the second model's shape matters to; its other files differ from the first's in names and
# numbers only, as the files of the sweep between its ends do from these.
SHORT = ("full", "apex", "apex_selected", "s2ft")
LONG = re.compile(rf".*/llama31_8b_(?!({'|'.join(SHORT)})$)|.*/llama2_7b_threshold_(6|12)")
RUNS = [
    pytest.param(name, marks=[pytest.mark.long] if LONG.match(name) else [])
    for name in runs_of("instruct") + runs_of("ablation")
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return instruct_run.write_inputs(tmp_path_factory.mktemp("instruct"))


def changed_weights(exported: Path, untrained: Path) -> tuple[dict[str, int], int]:
    """How many entries of each exported weight are not those of the base model, and of how many."""
    base = LlamaForCausalLM.from_pretrained(untrained, torch_dtype=torch.bfloat16).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(exported, torch_dtype="auto")
    tuned = tuned.state_dict()
    assert base.keys() == tuned.keys() and {w.dtype for w in tuned.values()} == {torch.bfloat16}
    changed = {name: int((tuned[name] != weight).sum()) for name, weight in base.items()}
    return changed, sum(weight.numel() for weight in base.values())


def check_adapters(run: Path, method: str) -> None:
    """All of them have learned; where the base changes checkpoints have it, elsewhere not."""
    saved = torch.load(run / "checkpoints/ep0-ba2-rank0.pt", weights_only=False)["state"]["model"]
    learned = [weight for name, weight in saved.items() if "lora_B" in name]
    assert len(learned) == 7 * 3
    whole = method in ("pissa", "relora")
    assert any("base_layer" in name for name in saved) == whole
    assert (run / "huggingface/final/adapter_model.safetensors").exists() != whole
    # ReLoRA has merged them into the base after the last batch, and begun anew.
    assert all(weight.any() == (method != "relora") for weight in learned)


@pytest.mark.parametrize("name", RUNS)
def test_the_yaml_trains_a_tiny_model_on_what_prep_instruct_writes(name, inputs, tmp_path):
    run = train(name, inputs, tmp_path)
    if "peft_config" in load(name)["model"]:
        check_adapters(run, method_of(name))
        return
    changed, total = changed_weights(run / "huggingface/final", inputs / model_of(name))
    share = sum(changed.values()) / total
    assert 0.1 < share <= 1
    mode = {file: mode for mode, file in MODES.items()}.get(method_of(name))
    if mode is not None:
        whole = {key for key in changed if "embed_tokens" in key or "lm_head" in key}
        norms = {key for key in changed if "norm" in key}
        rows = set(changed) - whole - norms
        trained = {"full": rows | whole | norms, "half": rows | whole, "selected": rows}[mode]
        assert {key for key, count in changed.items() if count} == trained
        # Two stages, each with rows of its own.
        few, many = (0.9, 1) if mode == "full" else (0.5 * IN_SMALL[mode], 2 * IN_SMALL[mode])
        assert few < share <= many


def train_sharded(name: str, inputs: Path, runs: Path, **changed) -> Path:
    """Train two batches on two ranks with FSDP2; returns the run's folder."""
    given = arguments(name, inputs, runs, **changed, device_train_microbatch_size=1)
    run_script(TESTS / "instruct_worker.py", *given, FSDP_VERSION="2")
    (run,) = runs.iterdir()
    return run


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "hft", "rmt", "gmt", "s2ft"])
def test_the_yaml_trains_on_two_ranks(method, inputs, tmp_path):
    """As its command says, with FSDP2; activations are checkpointed there."""
    run = train_sharded(f"instruct/llama2_7b_{method}", inputs, tmp_path)
    exported = run / "huggingface/final"
    if (exported / "adapter_model.safetensors").exists():
        adapter = load_file(exported / "adapter_model.safetensors")
        assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    elif method != "pissa":
        changed, _ = changed_weights(exported, inputs / "llama2_7b")
        assert any(changed.values())
    one_file = method in ("lora", "dora")
    saved = run / "checkpoints" / ("ep0-ba2-rank0.pt" if one_file else "ep0-ba2")
    assert saved.is_file() == one_file and saved.is_dir() != one_file


def rewound(run: Path, folder: Path) -> None:
    """A copy of a finished run as it was after its first batch."""
    copy = Path(shutil.copytree(run, folder / run.name, symlinks=True))
    shutil.rmtree(copy / "huggingface", ignore_errors=True)
    for path in (copy / "checkpoints").iterdir():
        if path.is_symlink():
            target = os.readlink(path).replace("ba2", "ba1")
            path.unlink()
            path.symlink_to(target)
        elif "ba2" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def saved_weights(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The model in the last checkpoint, of one file or of shards."""
    path = run / "checkpoints/ep0-ba2-rank0.pt"
    if not path.exists():
        path = folder / "whole.pt"
        dcp_to_torch_save(run / "checkpoints/ep0-ba2", path)
    return torch.load(path, weights_only=False)["state"]["model"]


@pytest.mark.parametrize(
    ("training", "method"),
    [
        (train, "apex_selected"),
        (train, "relora"),
        *(
            pytest.param(train_sharded, method, marks=pytest.mark.long)
            for method in (*MODES.values(), "lora", "relora")
        ),
    ],
)
def test_the_same_command_goes_on_from_the_last_checkpoint(training, method, inputs, tmp_path):
    name = f"instruct/llama2_7b_{method}"
    first = training(name, inputs, tmp_path / "first", save_interval="1ba")
    rewound(first, tmp_path / "second")
    second = training(name, inputs, tmp_path / "second", save_interval="1ba")
    # What it had is still what it had: it has not begun anew.
    times = [
        {p.name: p.stat().st_mtime_ns for p in (run / "checkpoints").glob("*ba1*")}
        for run in (first, second)
    ]
    assert times[0] == times[1] and times[0]
    assert_same_weights(*(saved_weights(run, run.parent) for run in (first, second)))
    exported = [run / "huggingface/final/model.safetensors" for run in (first, second)]
    if exported[0].exists():  # adapters are exported otherwise
        assert_same_weights(*map(load_file, exported))


def test_the_exported_model_chats(inputs, tmp_path):
    """As docs/instruct.md says."""
    run = train("instruct/llama2_7b_apex", inputs, tmp_path)
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
        train("instruct/llama31_8b_full", inputs, tmp_path, **cache, **changed)
    assert not list(tmp_path.iterdir())
