"""A two-layer Llama, its tokenizer and token shards on disk, and a command that trains on them."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import own_names
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
SEQUENCE = 16


def write_model(folder: Path) -> None:
    """Save a two-layer Llama with random weights, 8 query and 4 KV heads, and a tokenizer."""
    words = {f"w{number}": number for number in range(VOCABULARY - 1)}
    words["<eos>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE // 2,  # shorter than the run's, as TinyLLaMA's is
        eos_token_id=VOCABULARY - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_shards(folder: Path, samples: int = 24, seed: int = 0) -> None:
    """Write random sequences as MDS with uint16 tokens, as `apex_composer.data_prep` does."""
    generator = numpy.random.default_rng(seed)
    columns = {"tokens": f"ndarray:uint16:{SEQUENCE}"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for _ in range(samples):
            tokens = generator.integers(0, VOCABULARY, SEQUENCE).astype(numpy.uint16)
            writer.write({"tokens": tokens})


def composer(script: Path, arguments: Iterable[object], folder: Path) -> str:
    """Run a training script under `composer -n 1` in `folder` and return what it printed.

    With `own_names`, so that nothing else that starts at the same moment gets in its way.

    Raises:
        AssertionError: the run failed; with the end of its output.
    """
    launcher = Path(sys.executable).with_name("composer")
    command = [launcher, "-n", "1", own_names.__file__, script, *arguments]
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout
