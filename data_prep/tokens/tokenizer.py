"""The tokenizer that a preparation is given, and the type that its tokens have on disk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_composer.data_prep.errors import SettingsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UINT16_VOCABULARY = 1 << 16
HASHED_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True)
class TokenizerFacts:
    """What data says of the tokenizer that made it.

    Args:
        name: folder, or name on the hub.
        sha256: hash of what decides the tokens of a text.
        vocabulary_size: number above every token.
        bos: token that begins a document, None for none.
        eos: token that ends it.
    """

    name: str
    sha256: str
    vocabulary_size: int
    bos: int | None
    eos: int


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


def load_tokenizer(name: str, folder: Path) -> TokenizerFacts:
    """Load a given tokenizer with transformers and save it as a folder.

    Args:
        name: local folder, or a name on the hub.
        folder: created; the workers read its `tokenizer.json`.

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
    return TokenizerFacts(
        name=name,
        sha256=hash_backend((folder / "tokenizer.json").read_text(encoding="utf-8")),
        # Not their number, which is smaller where the ids have gaps.
        vocabulary_size=max(tokenizer.get_vocab().values()) + 1,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
    )


def read_backend(path: str) -> "Tokenizer":
    """Read the `tokenizer.json` that a worker uses; text that spells a marker stays text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.no_truncation()
    backend.no_padding()
    # A document that spells out a marker must not end another document.
    backend.encode_special_tokens = True
    return backend


def token_type(vocabulary_size: int) -> str:
    """Name the smallest unsigned integer type that holds every token.

    Args:
        vocabulary_size: number of tokens.
    """
    return "uint16" if vocabulary_size <= UINT16_VOCABULARY else "uint32"
