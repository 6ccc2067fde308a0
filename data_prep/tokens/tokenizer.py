"""Train a byte-level BPE tokenizer, or load a given one, in the form that transformers has."""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.data_prep.errors import SettingsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# Not EOS: collators mask the padding token out of the loss, and EOS has to be learned.
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
HASHED_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> "Tokenizer":
    """Train byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: training documents only, so that nothing is learned from the validation ones.
        vocabulary_size: number of tokens, special ones included; at least 259. Texts in which no
            two tokens are left to be joined give fewer.

    Raises:
        ValueError: the vocabulary cannot hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary_size={vocabulary_size} is too small: the 256 bytes and the special tokens "
            f"{', '.join(SPECIAL_TOKENS)} need {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # Prompts then start as the training documents do.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    # The markers are ours: a document that spells one out must not end another document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Save a tokenizer as a folder that `AutoTokenizer.from_pretrained` loads.

    Args:
        tokenizer: trained tokenizer.
        folder: created when missing.
    """
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # generate() refuses any others
    )
    fast.save_pretrained(folder)


def tokenizer_hash(folder: Path) -> str:
    """Hash what decides the tokens of a text, from a saved tokenizer.

    Args:
        folder: with `tokenizer.json`.
    """
    return hash_backend((folder / "tokenizer.json").read_text(encoding="utf-8"))


def hash_backend(description: str) -> str:
    """Hash what decides the tokens of a text: sha256 of the model and of what comes before it.

    Truncation, padding and the post-processor are left out: they belong to how a tokenizer was
    last called, and preparation uses none of them.

    Args:
        description: JSON of a fast tokenizer: `tokenizer.backend_tokenizer.to_str()`.
    """
    parts = json.loads(description)
    kept = {name: parts.get(name) for name in HASHED_PARTS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """Load a given tokenizer with transformers and save it as a folder.

    Args:
        name: local folder, or a name on the hub.
        folder: created; the workers read its `tokenizer.json`.

    Returns:
        name, sha256, vocabulary_size, bos (None when the tokenizer has none) and eos.

    Raises:
        SettingsError: there is no such tokenizer, it is no fast one, or it has no eos.
    """
    if (Path(name) / "tokenizer_config.json").is_file():
        name = str(Path(name))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:  # the backend raises bare ones
        raise SettingsError(
            f"tokenizer={name!r} cannot be loaded: {str(error).splitlines()[0]} Give a folder "
            "that save_pretrained wrote, or a name on the hub (with a network)."
        ) from error
    if not tokenizer.is_fast:
        raise SettingsError(
            f"tokenizer={name!r} has no fast version (tokenizer.json). Give another."
        )
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"tokenizer={name!r} has no eos token, which ends every document.")
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the backend has no error of its own for a full disk
        raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error
    return {
        "name": name,
        "sha256": tokenizer_hash(folder),
        # Not their number, which is smaller where the ids have gaps.
        "vocabulary_size": max(tokenizer.get_vocab().values()) + 1,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }


@lru_cache(maxsize=2)
def read_backend(path: str) -> "Tokenizer":
    """Read the `tokenizer.json` that a worker uses; text that spells a marker stays text.

    Args:
        path: of the file.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.no_truncation()
    backend.no_padding()
    # A document that spells out a marker must not end another document.
    backend.encode_special_tokens = True
    return backend
