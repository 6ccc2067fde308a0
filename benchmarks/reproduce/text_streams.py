"""From documents to streams of tokens: what `texts.py` does where apex-composer is installed.

Every domain is divided by itself, by whole documents in the order of their texts' hashes: first
what is held out, then what the runs continue on, then what the base learns from. No text is there
twice, in whatever domain. The tokenizer learns before tokens can be counted, so more text is kept
from it than will be held out: the rest of that goes to the continued runs.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from reproduce.texts import DESCRIPTION, SPLITS, TOKENIZER, hash_streams

from apex_composer.data_prep.atomic_files import new_file, new_folder, write_json, write_text
from apex_composer.data_prep.choose.estimate import take_samples
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.read.sources import find_sources
from apex_composer.data_prep.tokens.document_hash import hash_text
from apex_composer.data_prep.tokens.word_encoder import make_encoder
from apex_composer.demo.documents import take_documents
from apex_composer.demo.tokenizer import BOS, EOS, SMALLEST_VOCABULARY, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT_SHARE = 1 / 3  # of a domain's text at most
CONTINUED_SHARE = 0.3  # of the tokens that are not held out
# More than any tokenizer of this size reaches: text kept from it for each token to be held out.
MOST_BYTES_PER_TOKEN = 8
TOKENIZER_BYTES = 20_000_000  # of text that it learns from, the same of every domain
LARGEST_VOCABULARY = 1 << 16  # uint16
ENCODED_AT_ONCE = 64  # documents


def check_numbers(vocabulary: int, domain_bytes: int, held_out_tokens: int) -> None:
    """Refuse what would fail only after all text has been collected.

    Raises:
        ValueError: the message names the argument.
    """
    if not SMALLEST_VOCABULARY <= vocabulary <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocabulary={vocabulary} must be from {SMALLEST_VOCABULARY}, all bytes and special "
            f"tokens, to {LARGEST_VOCABULARY}, all that uint16 can number."
        )
    for name, value in {"domain_bytes": domain_bytes, "held_out_tokens": held_out_tokens}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def read_texts(data: Path, domain_bytes: int) -> dict[str, list[str]]:
    """Read the texts of all domains, each up to a limit, as the demo does."""
    sources = find_sources(data)
    domains = {domain for sample in take_samples(sources) for domain in sample.texts}
    return take_documents(sources, domain_bytes * len(domains))


def write_streams(
    folder: Path, documents: Mapping[str, Sequence[str]], made_of: Mapping[str, Any]
) -> None:
    """Tokenise documents, divide them, and write the whole folder.

    Args:
        folder: must not exist, or be empty.
        documents: texts of every domain.
        made_of: what texts.json says about them, with `asked_vocabulary` and
            `asked_held_out_tokens`.

    Raises:
        ValueError: a domain has too few documents to be divided.
    """
    wanted = made_of["asked_held_out_tokens"]
    ordered = order(documents)
    reserved = {domain: reserve(texts, wanted) for domain, texts in ordered.items()}
    training = {domain: texts[reserved[domain] :] for domain, texts in ordered.items()}
    tokenizer = learn_tokenizer(training, made_of["asked_vocabulary"])
    tokens = encode(ordered, tokenizer)
    divided = {d: divide(d, own, reserved[d], wanted) for d, own in tokens.items()}
    streams = {s: {d: np.concatenate(own[s]) for d, own in divided.items()} for s in SPLITS}
    text_bytes = {domain: sum(sizes(texts)) for domain, texts in ordered.items()}
    facts = {
        "hash": hash_streams(streams),
        "domains": {d: {s: len(streams[s][d]) for s in SPLITS} for d in divided},
        **made_of,
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens_per_byte": {d: sum(map(len, own)) / text_bytes[d] for d, own in tokens.items()},
        "documents": {d: {s: len(own[s]) for s in SPLITS} for d, own in divided.items()},
        "python": platform.python_version(),
    }
    with new_folder(folder) as partial:
        for split in SPLITS:
            for domain, stream in streams[split].items():
                with new_file(partial / split / f"{domain}.npy") as file:
                    np.save(file, stream)
        write_text(partial / TOKENIZER, tokenizer.to_str())
        write_json(partial / DESCRIPTION, facts)


def order(documents: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Put the texts of every domain in the order of their hashes, each text once in all."""
    seen: set[str] = set()
    ordered = {}
    for domain, texts in sorted(documents.items()):
        ordered[domain] = sorted(set(texts) - seen, key=hash_text)
        seen.update(texts)
    return ordered


def sizes(texts: Sequence[str]) -> list[int]:
    """Bytes of each text in UTF-8."""
    return [len(text.encode("utf-8")) for text in texts]


def reserve(texts: Sequence[str], held_out_tokens: int) -> int:
    """How many of the first texts may be held out: the tokenizer does not learn from these."""
    ends = np.cumsum(sizes(texts))
    room = min(HELD_OUT_SHARE * sum(sizes(texts)), MOST_BYTES_PER_TOKEN * held_out_tokens)
    return int(np.sum(ends <= room))


def count_until(wanted: float, lengths: Sequence[int]) -> int:
    """How many of the first reach together what is wanted; all, where they do not."""
    before = np.cumsum([0, *lengths])[:-1]
    return int(np.sum(before < wanted))


def learn_tokenizer(training: Mapping[str, Sequence[str]], vocabulary: int) -> "Tokenizer":
    """Train a tokenizer on the first texts of every domain, up to its part of TOKENIZER_BYTES."""
    part = TOKENIZER_BYTES / len(training)
    first = (texts[: count_until(part, sizes(texts))] for texts in training.values())
    return train_tokenizer((text for texts in first for text in texts), vocabulary)


def encode(
    documents: Mapping[str, Sequence[str]], tokenizer: "Tokenizer"
) -> dict[str, list[np.ndarray]]:
    """The tokens of every document between BOS and EOS, uint16."""
    encoder = make_encoder(tokenizer)  # the tokens of `encode_batch`, several times as fast
    bos, eos = (np.array([tokenizer.token_to_id(name)], np.uint16) for name in (BOS, EOS))
    total = sum(sum(sizes(texts)) for texts in documents.values())
    encoded: dict[str, list[np.ndarray]] = {domain: [] for domain in documents}
    with progress_bar(total=total, unit="B", unit_scale=True, desc="tokenising", delay=1) as bar:
        for domain, texts in documents.items():
            for start in range(0, len(texts), ENCODED_AT_ONCE):
                some = list(texts[start : start + ENCODED_AT_ONCE])
                for tokens in encoder(some):
                    encoded[domain].append(np.concatenate([bos, tokens.astype(np.uint16), eos]))
                bar.update(sum(sizes(some)))
    return encoded


def divide(
    domain: str, documents: Sequence[np.ndarray], reserved: int, held_out_tokens: int
) -> dict[str, Sequence[np.ndarray]]:
    """Divide a domain's documents among the splits.

    Args:
        domain: its name.
        documents: tokens of each, in their order.
        reserved: how many of the first may be held out.
        held_out_tokens: wanted; that there are fewer, is said on stderr.

    Returns:
        Documents per split.

    Raises:
        ValueError: a split would have none.
    """
    lengths = [len(document) for document in documents]
    held_out = count_until(held_out_tokens, lengths[:reserved])
    continued = count_until(CONTINUED_SHARE * sum(lengths[held_out:]), lengths[held_out:])
    parts = (documents[held_out + continued :], documents[held_out:][:continued])
    divided = dict(zip(SPLITS, (*parts, documents[:held_out]), strict=True))
    if empty := [split for split, own in divided.items() if not own]:
        raise ValueError(
            f"the domain {domain!r} has {len(documents)} different documents, too few or too long "
            f"to give one to {' and to '.join(empty)}. Add documents, or leave the domain out."
        )
    if (found := sum(lengths[:held_out])) < held_out_tokens:
        print(
            f"{domain}: {found:,} tokens are held out, not {held_out_tokens:,}: a third of its "
            "text has no more",
            file=sys.stderr,
        )
    return divided
