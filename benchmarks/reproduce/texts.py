"""Texts of the campaigns as flat streams of tokens: prepared once, loaded with numpy alone.

    python benchmarks/reproduce/texts.py runs/texts --vocabulary 4096 --domain-bytes 40000000
    python benchmarks/reproduce/texts.py runs/texts --data /data/redpajama

`<folder>/<split>/<domain>.npy` is one stream of uint16 per split and domain: each document is BOS,
its tokens, EOS, and documents stand in the order of their texts' hashes. `texts.json` says what
they were made of and has the hash that names them, `tokenizer.json` what made them. How documents
are divided, `text_streams.py` says.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("base", "continued", "held_out")
DESCRIPTION, TOKENIZER = "texts.json", "tokenizer.json"
SMALL = {"asked_vocabulary": 300, "asked_held_out_tokens": 4000}


@dataclass(frozen=True)
class Texts:
    """Prepared texts.

    Args:
        hash: sha256 of all streams and their names.
        domains: their names, sorted.
        streams: per split and domain, the tokens, uint16, mapped from their file.
        vocabulary: number of tokens in the tokenizer.
        facts: all of texts.json.
    """

    hash: str
    domains: tuple[str, ...]
    streams: Mapping[str, Mapping[str, np.ndarray]]
    vocabulary: int
    facts: dict[str, Any]


def prepare(
    folder: Path, data: Path | None, *, vocabulary: int, domain_bytes: int, held_out_tokens: int
) -> None:
    """Make the texts of a campaign, unless they are there already.

    Args:
        folder: to write, whole or not at all.
        data: folder of text as `apex-composer prep` reads it; None takes what is installed with
            this Python (`demo/embedded.py`): other installations give other text.
        vocabulary: tokens of the tokenizer, 65,536 at most.
        domain_bytes: text that is taken of each domain at most.
        held_out_tokens: of each domain at least, where a third of its text has as many.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: a number is out of range, the folder holds texts made otherwise, or a domain
            has too few documents to be divided.
    """
    from reproduce.text_streams import check_numbers, read_texts, write_streams

    from apex_composer.data_prep.read.sources import find_sources
    from apex_composer.demo.embedded import write_embedded_corpus

    check_numbers(vocabulary, domain_bytes, held_out_tokens)
    source = "text installed with Python"
    if data is not None:
        sizes = [source.bytes for source in find_sources(data)]
        source = f"{data.resolve().name}: {len(sizes)} files, {sum(sizes)} bytes"
    made_of = {"source": source, "domain_bytes": domain_bytes, "asked_vocabulary": vocabulary}
    made_of["asked_held_out_tokens"] = held_out_tokens
    if is_prepared(folder, made_of):
        return
    with tempfile.TemporaryDirectory() as temporary:
        if data is None:
            data = write_embedded_corpus(Path(temporary) / "text", domain_limit=domain_bytes)
        documents = read_texts(data, domain_bytes)
    write_streams(folder, documents, made_of)


def prepare_small(folder: Path) -> None:
    """Make texts of this repository's own pages in a second: the same in every copy of it.

    Args:
        folder: to write, as `prepare` does.
    """
    from reproduce.text_streams import write_streams

    pages = own_pages()
    content = pages_hash(pages)
    made_of = {"source": f"README.md and docs/*.md, sha256 {content}"} | SMALL
    if not is_prepared(folder, made_of):
        half = len(pages) // 2
        domains = {"first_pages": pages[:half], "other_pages": pages[half:]}
        write_streams(folder, {name: sections(own) for name, own in domains.items()}, made_of)


def own_pages() -> list[str]:
    """README and the pages of docs/."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path.read_text(encoding="utf-8") for path in paths]


def pages_hash(pages: Iterable[str]) -> str:
    """sha256 of their text."""
    return hashlib.sha256("\0".join(pages).encode()).hexdigest()


def sections(pages: Iterable[str]) -> list[str]:
    """Cut pages at their headings: so few whole pages cannot be divided in the parts wanted."""
    return [section for page in pages for section in page.split("\n## ")]


def is_prepared(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a folder holds texts that were made as is asked.

    Raises:
        FileExistsError: it holds no texts.
        ValueError: it holds others. They are not replaced, since results name them.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / DESCRIPTION).exists():
        raise FileExistsError(f"{folder} holds something else than texts. Give another folder.")
    facts = load(folder).facts
    found = {name: facts.get(name) for name in made_of if facts.get(name) != made_of[name]}
    if found:
        asked = {name: made_of[name] for name in found}
        raise ValueError(
            f"{folder} holds texts made with {found}, asked for is {asked}. Give another folder, "
            "or remove it together with the results made of it."
        )
    return True


def load(folder: Path) -> Texts:
    """Load prepared texts; needs numpy alone.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the streams are not what texts.json says.
    """
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        domains = tuple(facts["domains"])
        streams = {s: {d: _load_stream(folder, s, d, facts) for d in domains} for s in SPLITS}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} does not exist. Where apex-composer is installed, run `python "
            f"benchmarks/reproduce/texts.py {folder}`, and copy the folder to where it is missing."
        ) from error
    if hash_streams(streams) != facts["hash"]:
        raise ValueError(
            f"{folder}: its streams are not those that {DESCRIPTION} has the hash of. Remove it "
            "and prepare it again, or copy it again"
        )
    return Texts(facts["hash"], domains, streams, facts["vocabulary"], facts)


def hash_streams(streams: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The sha256 of all streams and their names, in the order of these."""
    digest = hashlib.sha256()
    for split, domains in sorted(streams.items()):
        for domain, stream in sorted(domains.items()):
            digest.update(f"{split}/{domain} {len(stream)}\n".encode())
            digest.update(np.ascontiguousarray(stream))
    return digest.hexdigest()


def _load_stream(folder: Path, split: str, domain: str, facts: Mapping[str, Any]) -> np.ndarray:
    path, wanted = folder / split / f"{domain}.npy", facts["domains"][domain][split]
    stream = np.load(path, mmap_mode="r")
    if stream.shape != (wanted,) or stream.dtype != np.uint16:
        raise ValueError(
            f"{path} holds {stream.dtype} of shape {stream.shape}, {DESCRIPTION} says uint16 of "
            f"shape ({wanted},). Remove {folder} and prepare it again."
        )
    return stream


def windows(texts: Texts, split: str, length: int) -> dict[str, np.ndarray]:
    """Cut the streams of a split so that every token but the first is predicted once.

    Args:
        texts: the prepared ones.
        split: one of SPLITS.
        length: tokens that are predicted in a window.

    Returns:
        Per domain a view [windows, length + 1]: window i holds the tokens from i * length to
        (i + 1) * length, both included. The end of a stream that fills no window is left out.

    Raises:
        ValueError: a stream is too short for one window.
    """
    for domain, stream in texts.streams[split].items():
        if len(stream) <= length:
            raise ValueError(
                f"{split}/{domain} has {len(stream)} tokens, a window of length={length} takes "
                f"{length + 1}. Give a shorter length, or prepare more text."
            )
    return {
        domain: np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
        for domain, stream in texts.streams[split].items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare texts and print what they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="default: text installed with Python")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--domain-bytes", type=int, default=40_000_000)
    parser.add_argument("--held-out-tokens", type=int, default=250_000)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    prepare(folder, **options)
    print(json.dumps(load(folder).facts, indent=2))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `reproduce`
    main()
