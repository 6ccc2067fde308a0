"""Texts and tokenizers of `prep_throughput.py`."""

import io
import json
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

from apex_composer.data_prep.read.sources import find_sources
from apex_composer.demo.documents import take_documents
from apex_composer.demo.embedded import write_embedded_corpus
from apex_composer.demo.tokenizer import save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FAMILIES = ("byte-level", "sentencepiece")
# A domain of the embedded corpus at most: all that there is, for start-up to be a small part.
EMBEDDED_BYTES = 60_000_000
FEW_CHARACTERS = 100_000  # some sequences for every domain, and a hundredth of the whole at most
# Text that a tokenizer learns from: every so many-th document, up to this size.
SAMPLE_BYTES = 30_000_000


def write_texts(data: Path | None, megabytes: float, work: Path, copies: int = 1) -> list[str]:
    """Write the texts as plain jsonl without `meta`, all that llm-foundry's converter can read.

    `<work>/all` has them all and `<work>/few` the first of every domain, each in one file in the
    folder `text`: the converter takes no sub-folders, and our pipeline takes it for a domain.

    Args:
        data: RedPajama folder, or None for the embedded corpus.
        megabytes: text to take, shared equally among the domains (see `take_documents`).
        work: folder to write.
        copies: how often each text is in `all`, with a number before it but for the first time.
            Default: 1.

    Returns:
        The texts, each once.
    """
    data = data or write_embedded_corpus(work / "embedded", domain_limit=EMBEDDED_BYTES)
    texts = take_documents(find_sources(data), int(megabytes * 1e6))
    few = [
        text
        for own in texts.values()
        for text, before in zip(own, accumulate(map(len, own), initial=0), strict=False)
        if before < FEW_CHARACTERS
    ]
    whole = list(chain.from_iterable(texts.values()))
    for kind, chosen, times in (("all", whole, copies), ("few", few, 1)):
        (work / kind / "text").mkdir(parents=True)
        numbered = (f"{n} {text}" if n else text for n in range(times) for text in chosen)
        lines = (json.dumps({"text": text}) + "\n" for text in numbered)
        (work / kind / "text" / "text.jsonl").write_text("".join(lines))
    sizes = {domain: sum(len(text.encode()) for text in own) for domain, own in texts.items()}
    print(f"{sum(sizes.values()) / 1e6:.0f} MB of text: {sizes}")
    return whole


def write_tokenizer(family: str, texts: list[str], vocabulary: int, folder: Path) -> None:
    """Train a tokenizer on a part of the texts.

    Args:
        family: one of FAMILIES.
        texts: all of them.
        vocabulary: number of tokens.
        folder: to write, as `AutoTokenizer` reads it.
    """
    step = max(1, sum(map(len, texts)) // SAMPLE_BYTES)
    if family == "byte-level":
        save_tokenizer(train_tokenizer(texts[::step], vocabulary), folder)
    else:
        train_sentencepiece(texts[::step], vocabulary, folder).save_pretrained(folder)


def train_sentencepiece(
    texts: Iterable[str], vocabulary: int, folder: Path
) -> "PreTrainedTokenizerFast":
    """Train SentencePiece BPE as Llama's was: bytes for the unknown, digits one by one.

    Args:
        texts: to learn from, by lines.
        vocabulary: number of tokens.
        folder: for its `tokenizer.model`.

    Returns:
        A tokenizer with the `tokenizer.json` that Llama 2 and TinyLlama are published with.
    """
    import sentencepiece
    from transformers import LlamaTokenizerFast

    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        max_sentence_length=1 << 14,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return LlamaTokenizerFast(vocab_file=str(path), legacy=True, add_prefix_space=True)
