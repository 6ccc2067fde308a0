"""Data for the demo: its own text and tokenizer, then three preparations such as anybody makes."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json, write_json
from apex_composer.data_prep.choose.job_plan import date_source
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.output_folder import check_apart, check_ours
from apex_composer.data_prep.preparation import prepare
from apex_composer.data_prep.read.sources import Source, find_sources
from apex_composer.data_prep.tokens.word_encoder import Encoder, make_encoder
from apex_composer.data_prep.write.manifest import read_manifest
from apex_composer.demo.documents import PRETRAIN, SPLITS, TRAIN, Texts, divide, take_documents
from apex_composer.demo.embedded import write_documents
from apex_composer.demo.tokenizer import save_tokenizer, train_tokenizer

TOKENIZER, TEXT, MADE_FROM = "tokenizer", "text", "made_from.json"
# Bytes of training text that the tokenizer learns from, shared equally among the domains.
TOKENIZER_SAMPLE = 8_000_000


@dataclass(frozen=True)
class Prepared:
    """What the runs of the demo read: `<out>/<split>/train/<domain>/` and `<out>/tokenizer/`.

    Args:
        domains: names of all that the text has, sorted.
        documents: how many were taken; sections count as documents.
        are_sections: whether they are sections, since no whole document could be held out.
        tokenizer: its name, sha256, vocabulary_size, bos and eos.
        splits: per split and domain, the manifests' counts of documents, tokens and sequences.
    """

    domains: list[str]
    documents: int
    are_sections: bool
    tokenizer: dict[str, Any]
    splits: dict[str, dict[str, dict[str, int]]]


def prepare_from_scratch(
    data: Path | str,
    out: Path,
    *,
    vocabulary_size: int,
    sequence_length: int,
    text_limit: int = 16_000_000,
    workers: int | None = None,
) -> Prepared:
    """Train a tokenizer on the data, then write validation, pretrain and train with it.

    What an earlier call with the same arguments has finished is not done again.

    Args:
        data: folder of text, see `find_sources`.
        out: folder to write.
        vocabulary_size: tokens in the trained tokenizer at most; fewer where the text yields no
            more.
        sequence_length: tokens in a training sequence.
        text_limit: bytes of text to take at most, shared equally among the domains; domains of
            few documents are taken whole (see `documents`). Default: 16,000,000.
        workers: processes. Default: one for each core.

    Raises:
        As `prepare`, and ValueError for a vocabulary that cannot hold all bytes.
    """
    check_apart(data, out)
    # Our own files, whatever a domain's name looks like.
    options = Options(sequence_length=sequence_length, format="jsonl", val_tokens=None)
    sizes = [vocabulary_size, sequence_length, text_limit]
    sources = find_sources(data)
    dated = [asdict(date_source(source)) for source in sources]
    wanted = {"out": str(out), "sizes": sizes, "sources": dated}
    made = read_json(out / MADE_FROM) or {}
    if made.get("wanted") != wanted:
        clear(out)
        made = {"wanted": wanted, "text": write_text_and_tokenizer(sources, out, *sizes)}
        write_json(out / MADE_FROM, made)
    given = {"tokenizer": out / TOKENIZER, "options": options, "workers": workers}
    splits = {split: {} for split in SPLITS}
    for split in SPLITS:
        text = out / TEXT / split
        if text.is_dir():
            manifest = read_manifest(out / split) or prepare(text, out / split, **given)
            splits[split] = manifest["splits"]["train"]
    return Prepared(**made["text"], tokenizer=manifest["tokenizer"], splits=splits)


def clear(out: Path) -> None:
    """Remove what was made of other text, or with other settings; a kill is made up for later.

    Raises:
        OutputTakenError: the folder holds something else.
    """
    if not any(out.glob(f"{MADE_FROM}*")):  # whole, or what a kill has left of it
        check_ours(out)
    write_json(out / MADE_FROM, {})  # first: the rest must not look whole
    for path in out.iterdir():
        if path.name != MADE_FROM:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text_and_tokenizer(
    sources: Sequence[Source],
    out: Path,
    vocabulary_size: int,
    sequence_length: int,
    text_limit: int,
) -> dict[str, Any]:
    """Write `<out>/text/<split>/<domain>/`, and a tokenizer that has seen no held-out text.

    Returns:
        The fields of Prepared that say what the text was.

    Raises:
        ValueError: there is nothing to hold out, or nothing to train on.
    """
    texts = take_documents(sources, text_limit)
    divided, are_sections = divide(texts, sequence_length)
    training = _sample(divided[PRETRAIN], divided[TRAIN])
    tokenizer = train_tokenizer(training, vocabulary_size)
    encode = make_encoder(tokenizer)
    for split, domains in divided.items():
        filled = [d for d in domains if _fills_a_sequence(domains[d], encode, sequence_length)]
        for domain in filled:
            path = out / TEXT / split / domain / f"{domain}.jsonl.zst"
            write_documents(path, ({"text": text} for text in domains[domain]))
        if not filled and split != TRAIN:
            found = (f"{domain} ({len(own)} documents)" for domain, own in domains.items())
            raise ValueError(
                f"Too little text for one sequence of {sequence_length} tokens in {split}: "
                f"{', '.join(found)}. Add documents."
            )
    documents = sum(len(own) for domains in divided.values() for own in domains.values())
    save_tokenizer(tokenizer, out / TOKENIZER)
    return {"domains": list(texts), "documents": documents, "are_sections": are_sections}


def _sample(*splits: Texts) -> Iterator[str]:
    """The first texts of every domain, until it has its part of the tokenizer's sample."""
    for domain in splits[0]:
        room = TOKENIZER_SAMPLE // len(splits[0])
        for text in chain.from_iterable(texts[domain] for texts in splits):
            if room <= 0:
                break
            room -= len(text.encode("utf-8"))
            yield text


def _fills_a_sequence(texts: Sequence[str], encode: Encoder, length: int) -> bool:
    tokens = accumulate(len(encode([text])[0]) + 2 for text in texts)  # with bos and eos
    return any(count >= length for count in tokens)
