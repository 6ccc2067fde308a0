"""Tokenize the documents of a domain and write each split's sequences as MDS shards."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from apex_composer.data_prep.sequences import cut, token_type, wrap_document
from apex_composer.data_prep.tokenizer import BOS, EOS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Documents are tokenized in batches of this many characters: enough for all cores, little memory.
BATCH_CHARACTERS = 1 << 20

Counts = dict[str, int]


def write_domain(
    out: Path,
    domain: str,
    documents: Iterable[tuple[str, str]],
    splits: tuple[str, ...],
    tokenizer: "Tokenizer",
    sequence_length: int,
) -> dict[str, Counts]:
    """Write `<out>/<split>/<domain>/` for every split, documents in the order given.

    Args:
        out: folder of the preparation.
        domain: name of the domain.
        documents: pairs of split and text.
        splits: names of the splits.
        tokenizer: trained tokenizer.
        sequence_length: tokens in a sequence.

    Returns:
        Per split: documents, tokens (bos and eos included), sequences, and tokens_left_over, the
        end of the last document that fills no sequence and is not written.
    """
    from streaming import MDSWriter

    dtype = token_type(tokenizer.get_vocab_size())
    columns = {"tokens": f"ndarray:{dtype}:{sequence_length}"}
    counts = {name: dict.fromkeys(("documents", "tokens", "sequences"), 0) for name in splits}
    remainders = {name: np.empty(0, dtype=dtype) for name in splits}
    with ExitStack() as stack:
        writers: dict[str, Any] = {
            name: stack.enter_context(MDSWriter(out=str(out / name / domain), columns=columns))
            for name in splits
        }
        for batch in batch_documents(documents):
            for name, wrapped in tokenize(batch, tokenizer, dtype).items():
                sequences, remainders[name] = cut(remainders[name], wrapped, sequence_length)
                for sequence in sequences:
                    writers[name].write({"tokens": sequence})
                counts[name]["documents"] += len(wrapped)
                counts[name]["tokens"] += sum(map(len, wrapped))
                counts[name]["sequences"] += len(sequences)
    for name in splits:
        counts[name]["tokens_left_over"] = len(remainders[name])
    return counts


def batch_documents(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group documents until a group reaches BATCH_CHARACTERS characters.

    Args:
        documents: pairs of split and text.
    """
    batch: list[tuple[str, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(
    batch: list[tuple[str, str]], tokenizer: "Tokenizer", dtype: str
) -> dict[str, list[np.ndarray]]:
    """Tokenize a batch on all cores and sort its documents by split.

    Args:
        batch: pairs of split and text.
        tokenizer: trained tokenizer.
        dtype: numpy name of the token type.

    Returns:
        Per split that occurs: one array [bos, tokens, eos] for each document, in order.
    """
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    by_split: dict[str, list[np.ndarray]] = {}
    for (name, _), encoding in zip(batch, encodings, strict=True):
        by_split.setdefault(name, []).append(wrap_document(encoding.ids, bos, eos, dtype))
    return by_split


def check_sequences(counts: dict[str, dict[str, Counts]], sequence_length: int) -> None:
    """Refuse a preparation in which a domain has no sequence in some split.

    Args:
        counts: per split and domain, as `write_domain` returns them.
        sequence_length: tokens in a sequence, for the message.

    Raises:
        ValueError: a split of a domain is empty; the message names every one.
    """
    empty = [
        f"{domain}/{name} ({numbers['documents']} documents, {numbers['tokens']} tokens)"
        for name, domains in counts.items()
        for domain, numbers in domains.items()
        if not numbers["sequences"]
    ]
    if empty:
        raise ValueError(
            f"Too little text for one sequence of {sequence_length} tokens in {', '.join(empty)}. "
            "Add documents to these domains or take their folders out, raise the split's share "
            "(validation_share, pretrain_share), or lower sequence_length."
        )
