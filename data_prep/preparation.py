"""The whole preparation: read, split, train the tokenizer, tokenize, write MDS and the manifest."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apex_composer.data_prep import readers, split, tokenizer
from apex_composer.data_prep.mds import check_sequences, write_domain
from apex_composer.data_prep.readers import ReadReport
from tqdm import tqdm

FORMAT = "apex-composer data 1"
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"


def prepare(
    data: Path | str,
    out: Path | str,
    *,
    vocabulary_size: int = 4096,
    sequence_length: int = 256,
    validation_share: float = 0.05,
    pretrain_share: float = 0.65,
    text_limit: int | None = None,
    tokenizer_sample: int = 8_000_000,
    maximum_reject_share: float = 0.001,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn a RedPajama-format folder into `<out>/<split>/<domain>/` MDS shards.

    The splits are `validation`, `pretrain` and `train` (continued pre-training). Everything is
    written beside `out` and moved there when it is complete.

    Args:
        data: folder `<data>/<domain>/**.jsonl[.zst|.gz]`.
        out: folder to create: shards, `tokenizer/`, `manifest.json`.
        vocabulary_size: tokens in the trained tokenizer. Default: 4096.
        sequence_length: tokens in a training sequence. Default: 256.
        validation_share: share of documents held out. Default: 0.05.
        pretrain_share: share of documents for the base model. Default: 0.65.
        text_limit: bytes of text to read at most, shared equally among the domains; None reads
            everything. Default: None.
        tokenizer_sample: bytes of training text that the tokenizer learns from, shared equally
            among the domains. Default: 8,000,000.
        maximum_reject_share: allowed share of unusable lines. Default: 0.001.
        overwrite: replace an earlier preparation at `out`. Default: False.

    Returns:
        The manifest: options, sources, tokenizer, rejects, and counts per split and domain.

    Raises:
        FileNotFoundError: `data` holds no documents.
        FileExistsError: `out` exists and may not be replaced.
        OSError: a file cannot be read.
        ValueError: a setting is out of range, too many lines are unusable, or a domain is too
            small to give every split a sequence.
    """
    data, out = Path(data), Path(out)
    options = {
        "vocabulary_size": vocabulary_size,
        "sequence_length": sequence_length,
        "validation_share": validation_share,
        "pretrain_share": pretrain_share,
        "text_limit": text_limit,
        "tokenizer_sample": tokenizer_sample,
        "maximum_reject_share": maximum_reject_share,
    }
    _check_options(options)
    shares = split.make_shares(validation_share, pretrain_share)
    domains = readers.find_files(data)
    _check_target(out, overwrite)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bpe = tokenizer.train_tokenizer(
        _tokenizer_texts(domains, shares, tokenizer_sample), vocabulary_size
    )
    tokenizer.save_tokenizer(bpe, partial / TOKENIZER_FOLDER)
    report = ReadReport()
    counts = _write_splits(partial, domains, shares, bpe, options, report)
    report.raise_if_above(maximum_reject_share)
    check_sequences(counts, sequence_length)
    manifest = _make_manifest(data, partial, domains, options, report, counts)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return manifest


def read_manifest(out: Path | str) -> dict[str, Any] | None:
    """Read the manifest of a finished preparation, or None where there is none.

    Args:
        out: folder that `prepare` was given.
    """
    try:
        manifest = json.loads((Path(out) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def is_prepared(data: Path | str, out: Path | str, **options: Any) -> bool:
    """Tell whether `out` already holds what `prepare(data, out, **options)` would write.

    Args:
        data: folder `<data>/<domain>/**.jsonl[.zst|.gz]`.
        out: folder of the earlier preparation.
        options: the options of `prepare` that are not left at their defaults.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return False
    defaults = {key: prepare.__kwdefaults__[key] for key in manifest["options"]}
    same_options = manifest["options"] == defaults | options
    return same_options and manifest["sources"] == _describe_sources(
        Path(data), readers.find_files(Path(data))
    )


def _check_options(options: dict[str, Any]) -> None:
    for name in ("sequence_length", "text_limit", "tokenizer_sample"):
        value = options[name]
        if value is not None and value < 2:
            raise ValueError(f"{name}={value} must be at least 2.")
    if not 0 <= options["maximum_reject_share"] < 1:
        raise ValueError(
            f"maximum_reject_share={options['maximum_reject_share']} must lie in [0, 1)."
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if read_manifest(out) is None:
        raise FileExistsError(
            f"out={str(out)!r} exists and was not written by this command. "
            "Give a folder that does not exist."
        )
    if not overwrite:
        raise FileExistsError(
            f"out={str(out)!r} already holds prepared data. "
            "Give another folder, or overwrite=True (--overwrite) to replace it."
        )


def _tokenizer_texts(
    domains: dict[str, list[Path]], shares: dict[str, float], sample: int
) -> Iterator[str]:
    """Yield training documents of every domain up to its part of the sample."""
    for files in domains.values():
        for text in limit_text(_read_files(files, ReadReport()), sample // len(domains)):
            if split.choose_split(text, shares) != split.VALIDATION:
                yield text


def limit_text(texts: Iterator[str], limit: int | None) -> Iterator[str]:
    """Yield texts until their bytes reach a limit; the text that reaches it is the last.

    Args:
        texts: documents.
        limit: bytes of UTF-8 text, or None for no limit.
    """
    total = 0
    for text in texts:
        yield text
        total += len(text.encode("utf-8"))
        if limit is not None and total >= limit:
            return


def _read_files(
    files: list[Path], report: ReadReport, progress: tqdm | None = None
) -> Iterator[str]:
    for path in files:
        yield from readers.read_documents(path, report, progress)


def _write_splits(
    partial: Path,
    domains: dict[str, list[Path]],
    shares: dict[str, float],
    bpe: Any,
    options: dict[str, Any],
    report: ReadReport,
) -> dict[str, dict[str, dict[str, int]]]:
    """Write every domain and return the counts per split and domain."""
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in shares}
    limit = options["text_limit"]
    total = sum(path.stat().st_size for files in domains.values() for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as progress:
        done = 0
        for domain, files in domains.items():
            texts = limit_text(
                _read_files(files, report, progress), limit and max(1, limit // len(domains))
            )
            documents = ((split.choose_split(text, shares), text) for text in texts)
            written = write_domain(
                partial, domain, documents, tuple(shares), bpe, options["sequence_length"]
            )
            for name, numbers in written.items():
                counts[name][domain] = numbers
            # A text limit leaves files unread: the bar moves on over them.
            done += sum(path.stat().st_size for path in files)
            progress.update(done - progress.n)
    return counts


def _describe_sources(data: Path, domains: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """List the source files with what shows a change without reading them."""
    return [
        {
            "path": path.relative_to(data).as_posix(),
            "bytes": path.stat().st_size,
            "modified_ns": path.stat().st_mtime_ns,
        }
        for files in domains.values()
        for path in files
    ]


def _make_manifest(
    data: Path,
    partial: Path,
    domains: dict[str, list[Path]],
    options: dict[str, Any],
    report: ReadReport,
    counts: dict[str, dict[str, dict[str, int]]],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "options": options,
        "domains": list(domains),
        "tokenizer": {
            "folder": TOKENIZER_FOLDER,
            "sha256": tokenizer.tokenizer_hash(partial / TOKENIZER_FOLDER),
            "vocabulary_size": options["vocabulary_size"],
        },
        "documents": report.documents,
        "rejects": {"lines": dict(report.rejects), "examples": report.examples},
        "splits": counts,
        "sources": _describe_sources(data, domains),
    }
