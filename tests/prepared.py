"""What the tests of data preparation share: a tokenizer, small options, and ways to look."""

import hashlib
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from corpus import sentences

from apex_composer.data_prep import Options, prepare
from apex_composer.demo.tokenizer import save_tokenizer, train_tokenizer

LENGTH = 32


@cache
def tokenizer_folder() -> Path:
    """A tokenizer of 320 tokens for corpus.sentences."""
    folder = Path(mkdtemp(prefix="apex-test-tokenizer-"))
    save_tokenizer(train_tokenizer([sentences(seed) for seed in range(50)], 320), folder)
    return folder


def small_options(**changes: Any) -> Options:
    """Budgets that corpus.write_corpus can fill, in many pieces and shards."""
    given = {
        "sequence_length": LENGTH,
        "val_tokens": 20 * LENGTH,
        "train_tokens": 60 * LENGTH,
        "cpt_tokens": 90 * LENGTH,
        "shard_bytes": 2048,
        "piece_bytes": 4096,
    }
    return Options(**given | changes)


def file_hashes(folder: Path) -> dict[str, str]:
    """The content of a folder, names and hashes; without the working folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".work" not in path.parts and path.name != "streams.yaml"
    }


def stored_sequences(folder: Path) -> list[Any]:
    """The sequences of one stream, as streaming reads them."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), batch_size=1)
    return [dataset[index]["tokens"] for index in range(len(dataset))]


def run(
    corpus: Path, out: Path, workers: int = 1, shard: tuple[int, int] | None = None, **changes: Any
) -> dict[str, Any] | None:
    """Prepare a corpus with `small_options`."""
    arguments = {"workers": workers, "shard": shard, "tokenizer": tokenizer_folder()}
    return prepare(corpus, out, options=small_options(**changes), **arguments)
