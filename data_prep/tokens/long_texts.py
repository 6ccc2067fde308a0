"""Texts in parts and batches, so that tokenising takes little memory however long a document is."""

import re
from collections.abc import Iterator
from typing import Any

from apex_composer.data_prep.tokens.word_encoder import Encoder

# Text is tokenised in batches of this many characters: a few 10 MB of encodings.
BATCH_CHARACTERS = 1 << 19
# A longer text would need gigabytes at once. It is tokenised in parts, cut at a blank between two
# words, where no tokenizer of the families that LLMs use joins anything: the tokens are those of
# the whole text. Text without such blanks is cut at the end of a line, else anywhere.
PART_CHARACTERS = 1 << 19
# U+2581 is SentencePiece's own blank.
WORD_GAP = re.compile("(?<=[^\\s\u2581]) (?=[^\\s\u2581])")
WORD_GAP_WINDOW = 1 << 12


def starts_with_blank(encode: Encoder) -> bool:
    """Whether a tokenizer puts a blank before a text, as SentencePiece does.

    Args:
        encode: the tokenizer, without special tokens.
    """
    once, twice = encode(["x", "x x"])
    return twice.tolist() == 2 * once.tolist()


def batch_parts(
    documents: Iterator[tuple[Any, str]], gives_blank: bool
) -> Iterator[list[tuple[Any, str, str]]]:
    """Group texts, long ones in parts, until a group has BATCH_CHARACTERS characters.

    Args:
        documents: pairs of anything and a text.
        gives_blank: whether the tokenizer puts a blank before a text.

    Yields:
        Lists of the document, a part of its text, and the part's position: `only`, `first`,
        `middle` or `last`.
    """
    batch: list[tuple[Any, str, str]] = []
    characters = 0
    for document, text in documents:
        for part, position in split_text(text, gives_blank):
            batch.append((document, part, position))
            characters += len(part)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def split_text(text: str, gives_blank: bool) -> Iterator[tuple[str, str]]:
    """Cut a long text into parts of PART_CHARACTERS characters at most.

    Args:
        gives_blank: whether the tokenizer puts a blank before a text: a part that begins after a
            cut at a blank is then given without it.

    Yields:
        A part and its position.
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        cut, follows = _find_cut(text, start, start + PART_CHARACTERS)
        yield text[start:cut], "middle" if start else "first"
        start = cut + (follows and gives_blank)
    yield text[start:], "last" if start else "only"


def _find_cut(text: str, start: int, stop: int) -> tuple[int, bool]:
    """Where a part ends, and whether the blank between two words follows."""
    middle = start + (stop - start) // 2
    for high in range(stop, middle, -WORD_GAP_WINDOW):
        low = max(middle, high - WORD_GAP_WINDOW)
        gaps = [match.start() for match in WORD_GAP.finditer(text, low, high)]
        if gaps:
            return gaps[-1], True
    line = text.rfind("\n", middle, stop)
    return (stop if line < 0 else line + 1), False
