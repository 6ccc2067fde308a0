"""Tokenise each distinct word once: the tokens of `encode_batch`, several times as fast.

A text is cut where no token can cross, so that the parts' tokens joined are the text's. Where that
is depends on the tokenizer; two families are known, and any other is left to the backend itself.

Byte-level BPE with GPT-2's pattern: the pattern starts a new match before the last white space of
a run and before the first non-space after one, whatever stands around. Cutting ` ?\\S+`, as the
pattern's branches for words, numbers and signs together do, cuts only where it does.

SentencePiece BPE (Llama 1 and 2, TinyLlama), which knows no words: blanks become U+2581, and no
token of the vocabulary has one after another character. So no merge ever joins across that place.
The same holds before and after a line's end when no longer token contains one, and where letters,
digits and signs of ASCII meet when nothing joins them. All of it is checked.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_composer.data_prep.tokens.tokenizer import read_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = "\u2581"
WORDS = re.compile(r" ?\S+|\s+(?!\S)|\s+")
# GPT-2's pattern for ASCII; a second chance for words such as `f(x);` that are rarely the same.
ASCII_WORDS = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)
BLANK_WORDS = re.compile(f"{BLANK}*[^{BLANK}]+|{BLANK}+")
BLANK_WORDS_OF_LINES = re.compile(f"{BLANK}*[^{BLANK}\n]+|{BLANK}+|\n")
ASCII_BLANK_WORDS = re.compile(f"{BLANK}*(?:[A-Za-z]+|[0-9]+|[^{BLANK}A-Za-z0-9]+)|{BLANK}+")
BYTE = re.compile("<0x[0-9A-F]{2}>")
# White space to Python's `re` only, or only by older versions of Unicode.
DISPUTED = re.compile("[\x1c-\x1f\u180e]")
# About 100 MB in a worker. Words that occur again come soon, so an emptied cache fills quickly.
CACHED_WORDS = 1 << 19
LONGEST_CACHED = 64

Encoder = Callable[[list[str]], list[np.ndarray]]


def read_encoder(path: str) -> Encoder:
    """Read a `tokenizer.json` as a function from texts to their tokens, without special tokens."""
    return _read_encoder(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=2)
def _read_encoder(path: str, modified_ns: int) -> Encoder:
    """Another tokenizer may be at the same path later on."""
    return make_encoder(read_backend(path))


def make_encoder(backend: "Tokenizer") -> Encoder:
    """Make the fastest function that gives the backend's tokens."""
    return make_word_encoder(backend) or (lambda texts: encode_all(backend, texts))


def encode_all(backend: "Tokenizer", texts: list[str]) -> list[np.ndarray]:
    """Tokenise whole texts: the reference."""
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def make_word_encoder(backend: "Tokenizer") -> Encoder | None:
    """Make a function that tokenises by words, or None for a tokenizer of neither family.

    Args:
        backend: of a fast tokenizer; its special tokens are taken for plain text, as
            `read_backend` sets it.
    """
    parts = json.loads(backend.to_str())
    if not _is_plain_bpe(parts) or not backend.encode_special_tokens:
        return None
    if _is_byte_level(parts):
        return WordEncoder(backend, parts["pre_tokenizer"], _keep, WORDS, ASCII_WORDS).encode
    prepare = _sentencepiece_preparation(parts)
    if prepare is None or not _cuts_before_blanks(parts["model"]):
        return None
    has_lines = any("\n" in token and token != "\n" for token in parts["model"]["vocab"])
    words = BLANK_WORDS if has_lines else BLANK_WORDS_OF_LINES
    smaller = ASCII_BLANK_WORDS if _joins_no_kinds(parts["model"]) else None
    return WordEncoder(backend, None, prepare, words, smaller).encode


class WordEncoder:
    """A tokenizer with a memory of words.

    Args:
        backend: the tokenizer that its tokens equal.
        pre_tokenizer: what is left to do with a word, as `tokenizer.json` has it, or None.
        prepare: what is done to a text before it is cut.
        words: pattern that cuts it.
        smaller_words: pattern that cuts an ASCII word further, None for none.
    """

    def __init__(
        self,
        backend: "Tokenizer",
        pre_tokenizer: dict[str, Any] | None,
        prepare: Callable[[str], str],
        words: re.Pattern[str],
        smaller_words: re.Pattern[str] | None,
    ) -> None:
        from tokenizers import Tokenizer

        parts = json.loads(backend.to_str())
        parts |= dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
        parts |= {"pre_tokenizer": pre_tokenizer, "added_tokens": []}
        self.backend, self.plain = backend, Tokenizer.from_str(json.dumps(parts))
        self.prepare, self.words, self.smaller_words = prepare, words, smaller_words
        self.known: dict[str, bytes] = {}
        self.smaller: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Tokenise texts.

        Returns:
            For each the tokens, uint32.
        """
        return [self._encode_text(text) for text in texts]

    def _encode_text(self, text: str) -> np.ndarray:
        if DISPUTED.search(text):
            return encode_all(self.backend, [text])[0]
        words = self.words.findall(self.prepare(text))
        new = set(words).difference(self.known)
        self.known |= self._encode_new(new)
        joined = b"".join(map(self.known.__getitem__, words))
        _forget(self.known, new)
        return np.frombuffer(joined, dtype=np.uint32)

    def _encode_new(self, words: Iterable[str]) -> dict[str, bytes]:
        if self.smaller_words is None:
            return self._encode_plain(words)
        ascii_words = {
            word: self.smaller_words.findall(word)
            for word in words
            if word.lstrip(BLANK).isascii()  # to GPT-2's pattern U+2581 is a sign like others
        }
        # Not `- keys()`, which would go through the whole cache.
        smaller = set(chain.from_iterable(ascii_words.values())).difference(self.smaller)
        self.smaller |= self._encode_plain(smaller)
        found = {
            word: b"".join(map(self.smaller.__getitem__, parts))
            for word, parts in ascii_words.items()
        }
        _forget(self.smaller, smaller)
        found |= self._encode_plain(word for word in words if word not in ascii_words)
        return found

    def _encode_plain(self, words: Iterable[str]) -> dict[str, bytes]:
        words = list(words)
        encodings = self.plain.encode_batch_fast(words, add_special_tokens=False)
        return {
            word: np.array(encoding.ids, dtype=np.uint32).tobytes()
            for word, encoding in zip(words, encodings, strict=True)
        }


def _forget(cache: dict[str, bytes], new: set[str]) -> None:
    """Keep a cache within its bounds."""
    for word in new:
        if len(word) > LONGEST_CACHED:
            del cache[word]
    if len(cache) > CACHED_WORDS:
        cache.clear()


def _keep(text: str) -> str:
    return text


def _is_plain_bpe(parts: dict[str, Any]) -> bool:
    model = parts["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in odd)
        and all(token["special"] for token in parts["added_tokens"])
    )


def _is_byte_level(parts: dict[str, Any]) -> bool:
    pre_tokenizer = parts["pre_tokenizer"] or {}
    return (
        parts["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("add_prefix_space") is False
        and pre_tokenizer.get("use_regex", True) is True
    )


def _sentencepiece_preparation(parts: dict[str, Any]) -> Callable[[str], str] | None:
    """What a tokenizer of this family does to a text, None when it does something else."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepend = {"type": "Prepend", "prepend": BLANK}
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]} and not pre_tokenizer:
        return lambda text: BLANK + text.replace(" ", BLANK) if text else text
    metaspace = {"type": "Metaspace", "replacement": BLANK, "split": False}
    if normalizer is None and pre_tokenizer in [
        metaspace | {"prepend_scheme": scheme} for scheme in ("always", "first")
    ]:
        return _replace_blanks
    return None


def _replace_blanks(text: str) -> str:
    replaced = text.replace(" ", BLANK)
    return replaced if replaced.startswith(BLANK) or not text else BLANK + replaced


def _cuts_before_blanks(model: dict[str, Any]) -> bool:
    """Whether no token goes on to a blank, and no two unknown characters become one token."""
    bytes_known = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    crosses = re.compile(f"[^{BLANK}]{BLANK}")
    return (
        bool(model.get("byte_fallback"))
        and bytes_known
        and not model.get("ignore_merges")
        and not any(crosses.search(token) for token in model["vocab"])
    )


def _joins_no_kinds(model: dict[str, Any]) -> bool:
    """Whether no merge joins ASCII characters of two kinds: letters, digits, all others."""
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if BYTE.search(first + second):  # stands for a character of any kind
            return False
        ends = first[-1] + second[0]
        if ends.isascii() and len({(end.isalpha(), end.isdigit()) for end in ends}) > 1:
            return False
    return True
