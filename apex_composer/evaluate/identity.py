"""Which model, on what, gave a number: what must agree for a result to be used again."""

import hashlib
import json
from typing import Any

import torch

from apex_composer.data_prep.progress import progress_bar


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of a model's weights as they are evaluated: names, shapes, dtypes and bytes.

    Of files it would say less: a checkpoint is converted, and `dtype` converts again.
    """
    digest = hashlib.sha256()
    weights = sorted(model.state_dict().items())
    for name, tensor in progress_bar(weights, desc="sha256", unit="weight", delay=2):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer's rules (of a slow one: its vocabulary), special tokens and template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    settings = f"{tokenizer.special_tokens_map}\n{tokenizer.chat_template}"
    return hashlib.sha256(f"{text}\n{settings}".encode()).hexdigest()


def settings_sha256(model: Any) -> str:
    """Hash of what turns the same weights into another function: rotary base, norms, generation.

    Without names of places and versions, which a copy of the folder changes.
    """
    settings = [model.config.to_dict()]
    if getattr(model, "generation_config", None) is not None:
        settings.append(model.generation_config.to_dict())
    for one in settings:
        for name in ("_name_or_path", "transformers_version", "torch_dtype", "use_cache"):
            one.pop(name, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def model_sha256(model: Any) -> str:
    """Hash of all that makes a model's outputs: `weights_sha256` and `settings_sha256`."""
    return hashlib.sha256(f"{weights_sha256(model)}{settings_sha256(model)}".encode()).hexdigest()


def check_positions(config: Any, sequence_length: int) -> None:
    """Refuse sequences that are longer than a model knows positions.

    Raises:
        ValueError: with the length that it knows.
    """
    positions = positions_of(config)
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"--sequence-length {sequence_length} is more than the {positions} positions that the "
            f"model knows: give --sequence-length {positions}, for every model that is compared"
        )


def positions_of(config: Any) -> int | None:
    """Tokens of the longest sequence that a model knows; None where its configuration is silent."""
    parts = (config, getattr(config, "text_config", None))  # of a model with images
    names = ("max_position_embeddings", "max_seq_len")
    known = (getattr(part, name, None) for part in parts for name in names)
    return next((int(length) for length in known if length is not None), None)


def describe_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What identifies a loaded model, and what it runs on."""
    device = model.device
    return {
        "weights_sha256": weights_sha256(model),
        "settings_sha256": settings_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
