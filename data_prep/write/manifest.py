"""The manifest: what a finished preparation holds, and whether a training run fits it."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.choose.document_index import (
    Corpus,
    Stream,
    count_left_out,
    count_rejects,
)
from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.choose.proportions import make_streams, share_out
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import MANIFEST, TOKENIZER_FOLDER
from apex_composer.data_prep.read.remote import local_copy
from apex_composer.data_prep.tokens.tokenizer import token_type

FORMAT = "apex-composer data 3"
# A training YAML may name the folder of a stream, of a split, or of all splits.
LEVELS_ABOVE = 2

Counts = dict[str, int]


def make_manifest(
    plan: Plan,
    options: Options,
    corpus: Corpus,
    codes: Any,
    streams: list[Stream],
    records: list[dict[str, Any]],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Put together what `manifest.json` holds.

    Args:
        plan: of the preparation.
        options: of the preparation.
        corpus: all documents.
        codes: their splits.
        streams: of all splits and domains.
        records: of all shards.
        files: bytes and sha256 of every other file of the output.
    """
    vocabulary = plan.tokenizer.vocabulary_size
    domains = _count_domains(plan, corpus, codes)
    content = {
        "format": FORMAT,
        "options": asdict(options),
        "domains": corpus.domains,
        "absent_domains": share_out(options.proportions, corpus.domains)[1],
        "tokenizer": asdict(plan.tokenizer) | {"folder": TOKENIZER_FOLDER},
        "dtype": token_type(vocabulary),
        "documents": sum(counts["documents"] for counts in domains.values()),
        "rejects": _count_rejects(corpus),
        "read": domains,
        "kept": plan.kept,
        "splits": _count_splits(streams, options.sequence_length),
        "shards": _list_shards(records),
        "files": files,
        "sources": _describe_sources(plan, corpus),
    }
    return content | {"sha256": hash_content(content)}


def hash_content(manifest: dict[str, Any]) -> str:
    """Hash a manifest by itself, so that a change of it is found.

    Args:
        manifest: with or without its hash.
    """
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _count_domains(plan: Plan, corpus: Corpus, codes: Any) -> dict[str, Counts]:
    """Per domain: what was read, and what of it is in no split."""
    totals = {domain: {"documents": 0, "documents_tokenised": 0} for domain in corpus.domains}
    for report in corpus.reports:
        for domain, counts in report.domains.items():
            for name, value in counts.items():
                totals[domain][name] += value
    for counts in totals.values():
        counts["documents_not_tokenised"] = counts["documents"] - counts.pop("documents_tokenised")
    left_out = count_left_out(corpus, codes)
    for number, domain in enumerate(corpus.domains):
        tokens = int(corpus.lengths[corpus.owners == number].sum(dtype="int64"))
        totals[domain] |= {"tokens": tokens} | left_out[domain]
    return totals


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


def _list_shards(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    files: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: (record["stream"], record["number"])):
        names = ("sequences", "file", "raw_bytes", "bytes", "sha256")
        files.setdefault(record["stream"], []).append({name: record[name] for name in names})
    return files


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
        sources[number]["rejects"] += count_rejects(report)
    for source, digest in zip(sources, hashes, strict=True):
        source["content_blake2b"] = digest.hexdigest()
    return sources


def filled_domains(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """The domains that have a sequence in a split, for every split that has any.

    Args:
        manifest: of the preparation.
    """
    filled = {
        split: [domain for domain, counts in domains.items() if counts["sequences"]]
        for split, domains in manifest["splits"].items()
    }
    return {split: domains for split, domains in filled.items() if domains}


def write_streams(manifest: dict[str, Any], out: Path, remote: str | None = None) -> str:
    """The `streams:` block of every split, with the proportions of the options.

    Args:
        manifest: of the preparation.
        out: output folder.
        remote: address that the output was uploaded to. Default: None.
    """
    options = manifest["options"]
    folder = options["streams_folder"] or str(out.absolute())
    absent = share_out(options["proportions"], manifest["domains"])[1]
    note = f"# Absent, so the others' proportions were raised: {', '.join(absent)}\n"
    blocks = []
    for split, domains in filled_domains(manifest).items():
        shares = share_out(options["proportions"], domains)[0]
        streams = make_streams(f"{folder}/{split}", shares, remote and f"{remote}/{split}")
        blocks.append(f"# {split}\n{streams}")
    # One block is a YAML document: paste the one that the run shall use.
    return (note if absent else "") + "---\n".join(blocks)


def read_manifest(out: Path | str) -> dict[str, Any] | None:
    """Read the manifest of a finished preparation, or None where there is none.

    Args:
        out: folder that `prepare` was given.

    Raises:
        ValueError: it is no JSON.
    """
    manifest = read_json(Path(out) / MANIFEST)
    return manifest if is_manifest(manifest) else None


def is_manifest(content: Any) -> bool:
    """Whether a file's content is a manifest of this command.

    Args:
        content: as JSON has it, None for no file.

    Raises:
        ValueError: it is one, of another version.
    """
    if not is_of_any_version(content):
        return False
    if content["format"] != FORMAT:
        raise ValueError(
            f"manifest.json has the format {content['format']!r}, this version reads {FORMAT!r}. "
            "Prepare the data again (--overwrite), or use the version that wrote it."
        )
    return True


def is_of_any_version(content: Any) -> bool:
    """Whether a file's content is a manifest of this command, perhaps of another version of it.

    Args:
        content: as JSON has it, None for no file.
    """
    name = content.get("format") if isinstance(content, dict) else None
    return isinstance(name, str) and name.startswith(FORMAT.rsplit(" ", 1)[0])


def check_manifest(
    data_folder: Path | str,
    tokenizer_hash: str,
    vocabulary_size: int,
    sequence_length: int,
    remote: str | None = None,
) -> dict[str, Any] | None:
    """Refuse prepared data that does not fit a training run.

    Args:
        data_folder: output of `prepare`, or the folder of a split or of a stream in it.
        tokenizer_hash: of the run's tokenizer, from
            `hash_backend(tokenizer.backend_tokenizer.to_str())`.
        vocabulary_size: tokens that the run's model knows.
        sequence_length: tokens in a sequence of the run.
        remote: address of the store that `data_folder` is a cache of. Default: None.

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
    if tokenizer["sha256"] != tokenizer_hash:
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
    if wrong:
        raise ValueError(
            f"The data in {place} does not fit this run: {'; '.join(wrong)}. Train with the "
            "tokenizer in its folder tokenizer/ and its sequence length, or prepare it again."
        )
    return manifest


def _find_manifest(folder: Path, remote: str | None) -> tuple[str, dict[str, Any] | None]:
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
