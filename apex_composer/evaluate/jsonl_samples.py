"""Read the samples of jsonl: documents, and answers to prompts and in chats."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from apex_composer.data_prep.instruct.records import take_conversation
from apex_composer.data_prep.instruct.tokenise import measure, tokenise
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.read.documents import read_records
from apex_composer.data_prep.read.records import take_document
from apex_composer.data_prep.read.sources import Source
from apex_composer.data_prep.tokens.long_texts import batch_parts, starts_with_blank
from apex_composer.data_prep.tokens.word_encoder import make_encoder
from apex_composer.evaluate.samples import Rows, Sample, rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cut = Literal["sequences", "documents"]
# Seconds after which reading shows a bar.
_DELAY = 2.0


@dataclass(frozen=True)
class Reader:
    """Reads the samples of jsonl; the arguments are those of `read_texts`.

    Args:
        left_out: counts the records that are left out, by reason.
    """

    tokenizer: "PreTrainedTokenizerBase"
    length: int
    samples: int | None
    seed: int
    cut: Cut
    left_out: Counter

    def read(self, domain: str, files: Sequence[Source]) -> Rows:
        """The samples of one domain, of which not more than `samples` are held."""
        records = self._records(domain, files)
        first = next(records, None)
        if first is None:
            return Rows([])
        records = chain([first], records)
        if isinstance(first, str) and self.cut == "sequences":
            tokens = np.concatenate(list(self._encode(records)))
            starts = range(0, len(tokens), self.length)
            return Rows([tokens[start : start + self.length] for start in starts])
        held, total = self._hold(domain, records)
        rows: list[Any] = list(held.values())
        if isinstance(first, str):
            rows = [tokens[: self.length] for tokens in self._encode(rows)]
        return Rows(dict(zip(held, rows, strict=True)), list(held), total)

    def _hold(self, domain: str, records: Iterator[Any]) -> tuple[dict[int, Any], int]:
        """Those that may be chosen, by their places, and how many there are."""
        total = 0

        def counted() -> Iterator[tuple[int, Any]]:
            nonlocal total
            for record in records:
                yield total, record
                total += 1

        if self.samples is None:
            return dict(counted()), total
        ranked = heapq.nsmallest(
            self.samples, counted(), key=lambda pair: rank(self.seed, domain, pair[0])
        )
        return dict(sorted(ranked, key=lambda pair: pair[0])), total

    def _records(self, domain: str, files: Sequence[Source]) -> Iterator[str | Sample]:
        """Texts, or samples with an answer; never both."""
        kinds: set[type] = set()
        with progress_bar(
            total=len(files), desc=f"reading {domain}", unit=" files", delay=_DELAY
        ) as bar:
            for file in files:
                for _, taken, _ in read_records(file, 0, None, self._take, self._reject):
                    for record in taken:
                        kinds.add(type(record))
                        if len(kinds) > 1:
                            raise ValueError(
                                f"{file.path}: {domain} holds texts and prompts with answers. "
                                "Give each a folder of its own"
                            )
                        yield record
                bar.update()

    def _take(self, record: Mapping[str, Any]) -> list[str] | list[Sample]:
        if "text" in record:
            return [take_document(record, "jsonl", "")[1]]
        conversation = take_conversation(record)
        measure(conversation, self.tokenizer, self.length)
        return list(self._answers(tokenise(conversation, self.tokenizer)))

    def _reject(self, line: int, reason: str, excerpt: str, domain: str | None) -> None:
        self.left_out[reason] += 1

    def _answers(self, turns: list[tuple[list[int], list[int]]]) -> Iterator[Sample]:
        """Each answer with what stands before it; the last one ends with eos, as in training."""
        tokens: list[int] = []
        for number, (prompt, response) in enumerate(turns, start=1):
            tokens = [*tokens, *prompt]
            start = len(tokens)
            tokens = [*tokens, *response]
            if number == len(turns) and tokens[-1] != self.tokenizer.eos_token_id:
                tokens = [*tokens, self.tokenizer.eos_token_id]
            yield Sample(torch.tensor(tokens), slice(start, len(tokens)))

    def _encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of documents, as prep writes them: uint32 [length] each."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a marker stays text
        encode = make_encoder(backend)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        parts = [] if bos is None else [[bos]]
        for batch in batch_parts(((None, text) for text in texts), starts_with_blank(encode)):
            encoded = encode([part for _, part, _ in batch])
            for ids, (_, _, position) in zip(encoded, batch, strict=True):
                parts.append(ids)
                if position in ("last", "only"):
                    yield np.concatenate([*parts, [eos]]).astype(np.uint32)
                    parts = [] if bos is None else [[bos]]
