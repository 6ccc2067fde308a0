"""The manifest: what a finished preparation holds, and whether a training run fits it."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.choose.document_index import Corpus, Stream, count_left_out
from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.choose.proportions import share_out, streams_block
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import INDEX, MANIFEST, TOKENIZER_FOLDER
from apex_composer.data_prep.read.remote import local_copy
from apex_composer.data_prep.tokens.document_hash import FIRST_HASH
from apex_composer.data_prep.tokens.tokenizer import token_type
from apex_composer.data_prep.write.mds import Shard, ShardFormat, index_files

FORMAT = "apex-composer data 3"
# A training YAML may name the folder of a stream, of a split, or of all splits.
LEVELS_ABOVE = 2

Counts = dict[str, int]
# What `manifest.json` holds; `make_manifest` lists its keys, data_prep/README.md explains them.
Manifest = dict[str, Any]


def make_manifest(
    plan: Plan,
    options: Options,
    corpus: Corpus,
    codes: np.ndarray,
    streams: list[Stream],
    shards: dict[str, list[Shard]],
    files: dict[str, dict[str, Any]],
) -> Manifest:
    """Put together what `manifest.json` holds.

    Args:
        plan: what the preparation was begun with.
        options: those that it is finished with.
        corpus: all documents.
        codes: their splits, as `choose_splits` returns them: int8 [n].
        streams: all splits and domains.
        shards: those of every stream that has any, in their order.
        files: bytes and sha256 of every other file of the output.
    """
    domains = _count_domains(corpus, codes)
    content = {
        "format": FORMAT,
        "options": asdict(options),
        "domains": corpus.domains,
        "absent_domains": share_out(options.proportions, corpus.domains)[1],
        "tokenizer": asdict(plan.tokenizer) | {"folder": TOKENIZER_FOLDER},
        "dtype": token_type(plan.tokenizer.vocabulary_size),
        "documents": sum(counts["documents"] for counts in domains.values()),
        "rejects": _count_rejects(corpus),
        "read": domains,
        "kept": plan.kept,
        "splits": _count_splits(streams, options.sequence_length),
        "shards": shards,
        "files": files,
        "sources": _describe_sources(plan, corpus),
    }
    if plan.document_hash != FIRST_HASH:  # which had no name
        content["document_hash"] = plan.document_hash
    return content | {"sha256": hash_content(content)}


def hash_content(manifest: Manifest) -> str:
    """Hash a manifest, with or without its hash, so that a change of it is found."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _count_domains(corpus: Corpus, codes: np.ndarray) -> dict[str, Counts]:
    """Per domain: what was read, and what of it is in no split."""
    totals = {domain: Counter() for domain in corpus.domains}
    for report in corpus.reports:
        for domain, counts in report.domains.items():
            totals[domain].update(counts)
    return {
        domain: {
            "documents": counts["documents"],
            "documents_not_tokenised": counts["documents"] - counts["documents_tokenised"],
            "tokens": int(corpus.lengths[corpus.owners == number].sum(dtype=np.int64)),
            **count_left_out(corpus, codes, number),
        }
        for number, (domain, counts) in enumerate(totals.items())
    }


def _count_splits(streams: list[Stream], length: int) -> dict[str, dict[str, Counts]]:
    splits: dict[str, dict[str, Counts]] = {}
    for stream in streams:
        splits.setdefault(stream.split, {})[stream.domain] = {
            "documents": len(stream.documents),
            "tokens": stream.tokens,
            "sequences": stream.sequences,
            "tokens_left_over": stream.tokens % length,
            "tokens_beyond_budget": stream.beyond,
        }
    return splits


def _count_rejects(corpus: Corpus) -> dict[str, Counts]:
    """Rejects by reason, and by domain where the file or the record shows one."""
    lines: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    for report in corpus.reports:
        for domain, reasons in report.rejects.items():
            lines.update(reasons)
            domains[domain] += sum(reasons.values())
    return {"lines": dict(sorted(lines.items())), "domains": dict(sorted(domains.items()))}


def _describe_sources(plan: Plan, corpus: Corpus) -> list[dict[str, Any]]:
    """Every file with its size, its documents, and one hash of all texts read from it."""
    sources = [asdict(source) | {"documents": 0, "rejects": 0} for source in plan.sources]
    hashes = [hashlib.blake2b(digest_size=16) for _ in sources]
    for (number, _, _), report in zip(plan.pieces, corpus.reports, strict=True):
        hashes[number].update(bytes.fromhex(report.content))
        sources[number]["documents"] += report.documents
        sources[number]["rejects"] += report.rejected
    for source, digest in zip(sources, hashes, strict=True):
        source["content_blake2b"] = digest.hexdigest()
    return sources


def write_streams(manifest: Manifest, out: Path, remote: str | None = None) -> str:
    """The `streams:` block of every split, with the proportions of the options.

    Args:
        manifest: what `prepare` returned.
        out: output folder.
        remote: address that the output was uploaded to. Default: None.
    """
    options = manifest["options"]
    folder = options["streams_folder"] or str(out.absolute())
    absent = ", ".join(manifest["absent_domains"])
    note = f"# Absent, so the others' proportions were raised: {absent}\n" if absent else ""
    blocks = []
    for split, domains in manifest["splits"].items():
        filled = [domain for domain, counts in domains.items() if counts["sequences"]]
        if not filled:
            continue
        shares = share_out(options["proportions"], filled)[0]
        streams = streams_block(f"{folder}/{split}", shares, remote and f"{remote}/{split}")
        blocks.append(f"# {split}, proportions in percent\n{streams}")
    # One block is a YAML document: paste the one that the run shall use.
    return note + "---\n".join(blocks)


def output_files(manifest: Manifest) -> dict[str, str]:
    """The sha256 of every file that the manifest accounts for, by its path in the output."""
    names = ("sequence_length", "shard_bytes", "compression")
    format = ShardFormat(manifest["dtype"], *(manifest["options"][name] for name in names))
    indices = index_files(manifest["shards"], format)
    shards = [shard for listed in manifest["shards"].values() for shard in listed]
    return {
        **{shard["file"]: shard["sha256"] for shard in shards},
        **{name: hashlib.sha256(content).hexdigest() for name, content in indices.items()},
        **{name: file["sha256"] for name, file in manifest["files"].items()},
    }


def read_manifest(out: Path | str) -> Manifest | None:
    """Read the manifest of a finished preparation, or None where there is none.

    Args:
        out: folder that `prepare` was given.

    Raises:
        ValueError: it is no JSON, or of another version.
    """
    manifest = read_json(Path(out) / MANIFEST)
    if not is_of_any_version(manifest):
        return None
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{MANIFEST} has the format {manifest['format']!r}, this version reads {FORMAT!r}. "
            "Prepare the data again (--overwrite), or use the version that wrote it."
        )
    return manifest


def read_finished(out: Path) -> Manifest:
    """Read the manifest of a preparation that must be there.

    Raises:
        SettingsError: there is no finished preparation.
    """
    manifest = read_manifest(out)
    if manifest is None:
        raise SettingsError(f"out={str(out)!r} holds no finished preparation ({MANIFEST}).")
    return manifest


def is_of_any_version(content: Any) -> bool:
    """Whether a file's content is a manifest of this command, perhaps of another version of it."""
    name = content.get("format") if isinstance(content, dict) else None
    return isinstance(name, str) and name.startswith(FORMAT.rsplit(" ", 1)[0])


def check_manifest(
    data_folder: Path | str,
    tokenizer_hash: str | None,
    vocabulary_size: int,
    sequence_length: int,
    remote: str | None = None,
) -> Manifest | None:
    """Refuse prepared data that does not fit a training run.

    Args:
        data_folder: output of `prepare`, or the folder of a split or of a stream in it.
        tokenizer_hash: that of the run's tokenizer,
            `hash_backend(tokenizer.backend_tokenizer.to_str())`; None for one that has none, which
            is not compared.
        vocabulary_size: tokens that the run's model knows.
        sequence_length: tokens in a sequence of the run.
        remote: address of the store that `data_folder` is a cache of, whose manifest counts where
            there is none above the cache. Default: None.

    Returns:
        The manifest that fits, or None where there is none: data of another origin.

    Raises:
        ValueError: something does not fit; the message names all of it.
    """
    place, manifest = _find_manifest(Path(data_folder), remote)
    if manifest is None:
        return None
    tokenizer, length = manifest["tokenizer"], manifest["options"]["sequence_length"]
    wrong = []
    if tokenizer_hash is not None and tokenizer["sha256"] != tokenizer_hash:
        wrong.append(
            f"it was tokenised with {tokenizer['name']!r} (sha256 {tokenizer['sha256'][:12]}), the "
            f"run's tokenizer has {tokenizer_hash[:12]}"
        )
    if tokenizer["vocabulary_size"] > vocabulary_size:
        wrong.append(
            f"its vocabulary has {tokenizer['vocabulary_size']} tokens, the model's has "
            f"{vocabulary_size}"
        )
    if length != sequence_length:
        wrong.append(f"its sequences have {length} tokens, max_seq_len is {sequence_length}")
    if remote is not None and not _is_cache_of(Path(data_folder), manifest):
        raise ValueError(
            f"{data_folder} holds shards that are not those of {remote}: they were fetched before "
            "the data there were prepared again, and streaming would go on reading them. Remove "
            "that folder on every node, or give `local` another one."
        )
    if wrong:
        raise ValueError(
            f"The data in {place} does not fit this run: {'; '.join(wrong)}. Train with the "
            "tokenizer in its folder tokenizer/ and its sequence length, or prepare it again."
        )
    return manifest


def _is_cache_of(folder: Path, manifest: Manifest) -> bool:
    """Whether what streaming has fetched into a stream's folder, if anything, is of this data."""
    index = folder / INDEX
    if not index.is_file():
        return True
    known = {sha for name, sha in output_files(manifest).items() if Path(name).name == INDEX}
    return hashlib.sha256(index.read_bytes()).hexdigest() in known


def _find_manifest(folder: Path, remote: str | None) -> tuple[str, Manifest | None]:
    """Look above the folder of a stream, then above its address."""
    for candidate in (folder, *list(folder.parents)[:LEVELS_ABOVE]):
        manifest = read_manifest(candidate)
        if manifest is not None:
            return str(candidate), manifest
    parts = (remote or "").rstrip("/").split("/")
    for levels in range(LEVELS_ABOVE + 1 if remote else 0):
        address = "/".join(parts[: len(parts) - levels])
        try:
            with local_copy(f"{address}/{MANIFEST}", attempts=1) as path:
                return address, read_manifest(path.parent)
        except OSError:
            continue
    return str(folder), None
