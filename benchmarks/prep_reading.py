"""MB of text that a core reads and hashes in a second, with json and gzip and as it is now.

`before` reads as commit 56beaba did: Python's json and gzip, a test of every text for halves of
surrogate pairs, and blake2b of 64 bits. It runs through the same generators as `now`, which is
what `apex-composer prep` does. The two take turns on the same plain, gzip and zstd file, in one
process, whose time on the processor is counted.

    python benchmarks/prep_reading.py
    python benchmarks/prep_reading.py --data FOLDER --megabytes 200 --rounds 15
"""

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
from paired import command_line, ratio_text, ratios, turns, write
from prep_inputs import EMBEDDED_BYTES

from apex_composer.data_prep.read import documents, lines
from apex_composer.data_prep.read.records import take_document
from apex_composer.data_prep.read.sources import Source, find_sources
from apex_composer.data_prep.tokens.document_hash import (
    FIRST_HASH,
    NEWEST_HASH,
    read_hash,
)
from apex_composer.demo.documents import take_documents
from apex_composer.demo.embedded import write_embedded_corpus

SUFFIXES = {"plain": "jsonl", "gzip": "jsonl.gz", "zstd": "jsonl.zst"}
NUMBERS = {"megabytes": 200, "document-bytes": 2000, "rounds": 9}


@contextmanager
def as_before() -> Iterator[None]:
    """Read as before orjson and isal."""

    def parse_line(line: bytes) -> Any:
        return json.loads(line.decode("utf-8-sig"))

    def take_and_encode(*given: Any) -> tuple[str, str]:
        domain, text = take_document(*given)
        text.encode("utf-8")
        return domain, text

    parts = {"parse_line": parse_line, "READ_BUFFER": 1 << 20}
    parts["Gunzipped"] = lambda archive: gzip.GzipFile(fileobj=archive)
    with patch.multiple(lines, **parts), patch.object(documents, "take_document", take_and_encode):
        yield


Side = tuple[Callable[[], AbstractContextManager[None]], Callable[[str], Any]]
SIDES: dict[str, Side] = {
    "before": (as_before, read_hash(FIRST_HASH)),
    "now": (nullcontext, read_hash(NEWEST_HASH)),
}


def measure(source: Source, side: str) -> tuple[float, int]:
    """Seconds on the processor in which a file is read and hashed, and characters in its texts."""
    reading, hash_one = SIDES[side]
    characters = 0
    with reading():
        started = time.process_time()
        for document in documents.read_documents(source, 0, None, _refuse):
            hash_one(document.text)
            characters += len(document.text)
        return time.process_time() - started, characters


def _refuse(line: int, reason: str, *_: object) -> None:
    raise ValueError(f"line {line}: {reason}")


def cut_texts(texts: Mapping[str, list[str]], size: int) -> list[str]:
    """The texts of all domains, cut into documents of so many characters at most."""
    whole = chain.from_iterable(texts.values())
    parts = (text[at : at + size] for text in whole for at in range(0, len(text), size))
    return [part for part in parts if not part.isspace()]


def write_files(texts: list[str], folder: Path) -> dict[str, Source]:
    """The same texts in a file of each compression."""
    sources = {}
    content = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()
    for kind, suffix in SUFFIXES.items():
        path = folder / f"text.{suffix}"
        with pyarrow.output_stream(str(path), compression="detect") as stream:
            stream.write(content)
        sources[kind] = Source(str(path), "text", "jsonl", path.stat().st_size, kind == "plain")
    return sources


def compare(source: Source, rounds: int, megabytes: float) -> dict[str, float]:
    """Both sides in turn: MB/s of each at its median, and the ratios of every round."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    characters = {measure(source, side)[1] for side in SIDES}  # not counted: the first is slower
    for order in turns(SIDES, rounds):
        for side in order:
            spent, read = measure(source, side)
            seconds[side].append(spent)
            characters.add(read)
    if len(characters) > 1:
        raise RuntimeError(f"{source.path}: the sides read different texts: {characters}")
    found = {side: megabytes / statistics.median(spent) for side, spent in seconds.items()}
    return found | ratios(seconds["before"], seconds["now"])


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__.splitlines()[0], NUMBERS)
    parser.add_argument("--data", type=Path, help="RedPajama folder; default: embedded corpus")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prep-reading-") as folder:
        data = arguments.data or write_embedded_corpus(
            Path(folder) / "embedded", domain_limit=EMBEDDED_BYTES
        )
        taken = take_documents(find_sources(data), int(arguments.megabytes * 1e6))
        texts = cut_texts(taken, arguments.document_bytes)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{megabytes:.0f} MB of text in {len(texts)} documents of {', '.join(taken)}")
        for kind, source in write_files(texts, Path(folder)).items():
            found = result[kind] = compare(source, arguments.rounds, megabytes)
            rates = "  ".join(f"{side} {found[side]:4.0f} MB/s" for side in SIDES)
            print(f"{kind:6} {rates}  {ratio_text(found, 2)}")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
