"""The result is that of training W and T by autograd through W_eff; under a trainer: trainer/."""

import pytest
import torch
from both_ways import compare
from helpers import VOCABULARY, tiny_llama, tiny_qwen
from transformers import MptConfig, MptForCausalLM

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_loop_equals_autograd_in_float64(clip):
    compare(tiny_llama(kv_heads=2, dtype=torch.float64), clip)


def test_a_loop_equals_autograd_in_float32():
    compare(tiny_llama(kv_heads=2), tolerance=1e-5)


def test_biases_are_expanded_with_their_rows():
    stages = compare(tiny_qwen(dtype=torch.float64))
    assert sum(len(operator["names"]) == 2 for operator in stages[0]) == 6


def test_fused_projection_equals_autograd():
    """Three operators share the rows of one Wqkv weight. transformers' MPT refuses float64."""
    config = MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, expansion_ratio=1, max_seq_len=64
    )
    stages = compare(MptForCausalLM(config), tolerance=1e-5)
    assert sum("Wqkv" in operator["names"][0] for operator in stages[0]) == 6
