"""Checkpoints as Composer saves them, of models of a few weights, without training them."""

from pathlib import Path

import torch
from composer.models import HuggingFaceModel
from tiny_run import write_model
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def base_folder(folder: Path) -> Path:
    """A tiny Llama and its tokenizer, with a chat template and settings for generation."""
    write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.generation_config.save_pretrained(folder)
    return folder


def tokenizer_of(base: Path):
    return AutoTokenizer.from_pretrained(base)


def noisy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """As if it had been trained: every trained weight changes, adapters become more than zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (0.1 * noise).to(parameter.dtype)
    return model


def wrapped(model: PreTrainedModel, tokenizer=None, **options) -> HuggingFaceModel:
    return HuggingFaceModel(model, tokenizer=tokenizer, use_logits=True, **options)


def save(model: HuggingFaceModel, path: Path, *, run: str = "run", batch: int = 0) -> Path:
    """One file, as Composer writes it, as far as it is about the model."""
    state = {
        "model": model.state_dict(),
        "run_name": run,
        "timestamp": {"Timestamp": {"batch": batch}},
        "integrations": {"huggingface": model.get_metadata()},
    }
    torch.save({"state": state}, path)
    return path


def save_run(base: Path, folder: Path, count: int) -> list[Path]:
    """So many checkpoints of one run of the base model."""
    tokenizer = tokenizer_of(base)
    return [
        save(wrapped(noisy(load(base), n), tokenizer), folder / f"ba{n}.pt", batch=n)
        for n in range(count)
    ]


def save_sharded(file: Path, folder: Path) -> Path:
    """The same as a folder of shards, of one rank."""
    content = torch.load(file, weights_only=False)
    checkpoint.save(content, storage_writer=FileSystemWriter(folder))
    return folder


def load(folder: Path, **options) -> PreTrainedModel:
    """A merged model, as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", **options)


def assert_loads_equal(folder: Path, weights: dict) -> None:
    """Bit for bit, in the same dtypes."""
    found = load(folder).state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
