"""A model of every architecture, of a few thousand random parameters.

A row holds the settings of its configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, MptConfig, PreTrainedModel

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIGURATIONS: dict[str, dict] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "head_dim": 16},  # not hidden_size / heads, as in Mistral-Nemo
    "qwen2": _GROUPED,  # with biases
    "qwen3": {**_GROUPED, "head_dim": 16},  # QK-norm by head
    "olmo2": _GROUPED,  # QK-norm over all heads, norms behind attention and FFN
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": _GEMMA,  # soft-capped attention and logits, norms before and behind, sliding windows
    "gemma3_text": _GEMMA,
    "gemma3": {
        "text_config": _GEMMA,
        "vision_config": {**_VISION, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "granite": {**_GROUPED, "attention_bias": True, "mlp_bias": True},
    "starcoder2": _GROUPED,
    "phi3": _GROUPED,
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "use_cache": False,
    },
    "gpt_neox": _SIZES,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 24,
        "n_positions": 64,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, random biases and random norms, without dropout."""
    torch.manual_seed(seed)
    if model_type == "mpt":  # of transformers itself: llm-foundry puts its own in the place of it
        config = MptConfig(**CONFIGURATIONS[model_type])
    else:
        config = AutoConfig.for_model(model_type, **CONFIGURATIONS[model_type])
    # Soft-capping has no other implementation that is right.
    attention = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **attention)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model.to(dtype).eval()


class _Wide(TorchFunctionMode):
    """Operations in float64 where float32 is asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {
            name: wide.get(value, value) if isinstance(value, torch.dtype) else value
            for name, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Norms and softmax, which models compute in float32 whatever their weights are, too."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
