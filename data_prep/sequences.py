"""Join tokenized documents and cut them into sequences of equal length."""

from collections.abc import Iterable

import numpy as np

UINT16_VOCABULARY = 1 << 16


def token_type(vocabulary_size: int) -> str:
    """Name the smallest unsigned integer type that holds every token.

    Args:
        vocabulary_size: number of tokens.
    """
    return "uint16" if vocabulary_size <= UINT16_VOCABULARY else "uint32"


def wrap_document(tokens: Iterable[int], bos: int, eos: int, dtype: str) -> np.ndarray:
    """Put a document's tokens between bos and eos.

    Args:
        tokens: the document's tokens.
        bos: token that starts a document.
        eos: token that ends a document.
        dtype: numpy name of the token type.
    """
    return np.array([bos, *tokens, eos], dtype=dtype)


def cut(
    remainder: np.ndarray, documents: list[np.ndarray], sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Append documents to the remainder of earlier ones and cut off all full sequences.

    Args:
        remainder: tokens left by the last call, shorter than a sequence: [r].
        documents: tokens of the next documents, each [n_i].
        sequence_length: tokens in a sequence.

    Returns:
        The sequences [count, sequence_length] and the new remainder [r'], r' < sequence_length.
    """
    tokens = np.concatenate([remainder, *documents])
    count = len(tokens) // sequence_length
    full = count * sequence_length
    return tokens[:full].reshape(count, sequence_length), tokens[full:]
