"""Architectures as data: what each calls its projections, and what their weights hold.

A new one is a row of the table and a row of tests/model/tiny_models.py, with which every test of an
architecture runs: its names, its units, exactness against autograd, export and resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The projections of an architecture's attention and FFN modules.

    Several parts in one projection are named in the order in which its outputs hold them. Of
    projections that only some of its models have (gates, fused ones) those are read that are there.
    Biases need no word: one is expanded where a projection has it.

    Attributes:
        attention: parts by the projection's name: `queries`, `keys`, `values`, `output`.
        ffn: parts by the projection's name: `gate`, `up`, `output`.
        head_size: attribute of the attention module that holds the size of a head.
        by_head: whether fused queries, keys and values lie head by head, [heads, parts, head size],
            instead of one part behind the other.
        transposed: whether weights are [inputs, outputs], as those of transformers' Conv1D.
    """

    attention: Mapping[str, str]
    ffn: Mapping[str, str]
    head_size: str = "head_dim"
    by_head: bool = False
    transposed: bool = False


_SEPARATE = {"q_proj": "queries", "k_proj": "keys", "v_proj": "values", "o_proj": "output"}
_GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "output"}
_C_FFN = {"c_fc": "up", "c_proj": "output"}
_LLAMA = Architecture(_SEPARATE, _GATED)

# By `model_type` of the model's configuration.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,  # Llama 1-3, TinyLLaMA
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,  # with images: its language model
    "gemma3_text": _LLAMA,
    "granite": _LLAMA,
    "starcoder2": Architecture(_SEPARATE, _C_FFN),
    "phi3": Architecture(  # Phi-3, 3.5 and 4
        attention={"qkv_proj": "queries keys values", "o_proj": "output"},
        ffn={"gate_up_proj": "gate up", "down_proj": "output"},
    ),
    "mpt": Architecture(  # llm-foundry's MPT and Hugging Face's
        attention={"Wqkv": "queries keys values", "Wq": "queries", "Wk": "keys", "Wv": "values"}
        | {"out_proj": "output"},
        ffn=_GATED,
    ),
    "gpt_neox": Architecture(  # Pythia
        attention={"query_key_value": "queries keys values", "dense": "output"},
        ffn={"dense_h_to_4h": "up", "dense_4h_to_h": "output"},
        head_size="head_size",
        by_head=True,
    ),
    "gpt2": Architecture(  # cross-attention, which has its queries in q_attn, is refused
        attention={"c_attn": "queries keys values", "q_attn": "queries", "c_proj": "output"},
        ffn=_C_FFN,
        transposed=True,
    ),
}


def how_to_add(model_type: str | None) -> str:
    """The lines that make an architecture known, for the error about one that is not."""
    return f"""A new one is added to the table in apex_composer/model/architectures.py, and tested:
    "{model_type}": Architecture(  # with the names that its modules have
        attention={{"q_proj": "queries", "k_proj": "keys", "v_proj": "values", "o_proj": "output"}},
        ffn={{"gate_proj": "gate", "up_proj": "up", "down_proj": "output"}},
        head_size="head_dim",
    ),"""
