"""The untrained model of the job: a local folder in the place of a name on a hub."""

import shutil
from pathlib import Path
from typing import Any


def write_model_folder(
    folder: Path, tokenizer: Path, architecture: dict[str, Any], sequence_length: int
) -> None:
    """Write a Llama's `config.json` beside the tokenizer; the weights come from the run's seed.

    Args:
        folder: folder to write; replaced when it exists.
        tokenizer: folder of the trained tokenizer.
        architecture: sizes of the model, as `transformers.LlamaConfig` names them.
        sequence_length: longest context, in tokens.

    Raises:
        ValueError: `architecture` has a key that LlamaConfig does not know.
    """
    from transformers import AutoTokenizer, LlamaConfig

    unknown = sorted(set(architecture) - set(LlamaConfig().to_dict()))
    if unknown:
        raise ValueError(f"variables.model: {unknown} are no settings of transformers.LlamaConfig.")
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokens),
        max_position_embeddings=sequence_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        architectures=["LlamaForCausalLM"],
        **architecture,
    )
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tokenizer, folder)
    config.save_pretrained(folder)
