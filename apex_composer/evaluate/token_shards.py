"""The sequences of an MDS folder one by one, without the shared memory of streaming's dataset."""

import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.paths import INDEX
from apex_composer.data_prep.tokens.tokenizer import hash_backend
from apex_composer.data_prep.write.manifest import check_manifest

# Bytes of an offset, of which a shard has one for every sample and one more, after their number.
_OFFSET = 4
# Of tokens that were written as bytes: llm-foundry's `token_encoding_type`.
_BYTES = np.int64


class TokenShards:
    """The token sequences of one MDS folder, as `apex-composer prep` or llm-foundry writes it.

    Args:
        folder: with `index.json`; shards plain or compressed.
        tokenizer: the one that made the tokens.
        sequence_length: tokens of a sequence.

    Raises:
        ValueError: the manifest above it names another tokenizer, vocabulary or length, or it holds
            no tokens.
    """

    def __init__(self, folder: Path, tokenizer: Any, sequence_length: int) -> None:
        from streaming.base.format import reader_from_json

        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        known = hash_backend(tokenizer.backend_tokenizer.to_str())
        check_manifest(folder, known, self.vocabulary, sequence_length)
        self.folder, self.sequence_length = folder, sequence_length
        shards = json.loads((folder / INDEX).read_text())["shards"]
        self.shards = [reader_from_json(str(folder), "", shard) for shard in shards]
        for shard in self.shards:
            shard.validate(allow_unsafe_types=False)
            if "tokens" not in shard.column_names:
                raise ValueError(
                    f"{folder} has the columns {', '.join(shard.column_names)}: needed is `tokens`."
                    " Give the texts as jsonl, or prepare them with `apex-composer prep`"
                )
        self.ends = list(accumulate(shard.samples for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, place: int) -> np.ndarray:
        """Tokens of one sequence: int64 [length].

        Raises:
            ValueError: it is longer than `sequence_length`, or has a token that is none.
        """
        number = bisect_right(self.ends, place)
        shard = self.shards[number]
        first = self.ends[number] - shard.samples
        raw = _read_shard(shard, self.folder)
        at = (1 + place - first) * _OFFSET
        start, stop = np.frombuffer(raw[at : at + 2 * _OFFSET], np.uint32)
        tokens = shard.decode_sample(raw[start:stop])["tokens"]
        if isinstance(tokens, bytes):
            tokens = np.frombuffer(tokens, _BYTES)
        tokens = tokens.astype(np.int64)
        if len(tokens) > self.sequence_length:
            raise ValueError(
                f"{self.folder}: its sequences have {len(tokens)} tokens, sequence_length is "
                f"{self.sequence_length}: give {len(tokens)}"
            )
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            raise ValueError(
                f"{self.folder} has the token {tokens.max()}, and the tokenizer {self.vocabulary} "
                "tokens: it was made with another one"
            )
        return tokens


@lru_cache(maxsize=1)  # sequences are read in their order
def _read_shard(shard: Any, folder: Path) -> bytes:
    """A whole shard, decompressed in memory: nothing is written beside what is read."""
    from streaming.base.compression import decompress

    raw = folder / shard.raw_data.basename
    if raw.is_file():
        return raw.read_bytes()
    return decompress(shard.compression, (folder / shard.zip_data.basename).read_bytes())
