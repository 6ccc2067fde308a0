"""Read a finished preparation again and compare it with its manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

from apex_composer.data_prep import shards
from apex_composer.data_prep.manifest import TOKENIZER_FOLDER, read_manifest
from apex_composer.data_prep.options import SettingsError
from apex_composer.data_prep.pool import check_workers, run_tasks
from apex_composer.data_prep.progress import token_bar
from apex_composer.data_prep.tokenizer import tokenizer_hash

READ = ("tokens_duplicates", "tokens_beyond_budget")


def verify(out: Path | str, *, workers: int | None = None) -> list[str]:
    """Check every byte and every count of a preparation.

    Args:
        out: folder that `prepare` was given.
        workers: processes. Default: one for each core.

    Returns:
        What is wrong, one line each; empty when all is well.

    Raises:
        SettingsError: there is no finished preparation.
    """
    out = Path(out)
    manifest = read_manifest(out)
    if manifest is None:
        raise SettingsError(f"out={str(out)!r} holds no finished preparation (manifest.json).")
    faults = check_counts(manifest)
    try:
        if tokenizer_hash(out / TOKENIZER_FOLDER) != manifest["tokenizer"]["sha256"]:
            faults.append(f"{TOKENIZER_FOLDER}: not the tokenizer of the manifest")
    except (OSError, ValueError) as error:
        faults.append(f"{TOKENIZER_FOLDER}: cannot be read ({error})")
    tasks: list[dict[str, Any]] = []
    for stream, files in manifest["shards"].items():
        found, stream_tasks = _stream_tasks(out, stream, files, manifest)
        faults += found
        tasks += stream_tasks
    workers = min(check_workers(workers), len(tasks) or 1)
    length = manifest["options"]["sequence_length"]
    tokens = sum(task["sequences"] for task in tasks) * length
    with token_bar(tokens, "verifying") as bar:
        run_tasks(
            check_shard_file, iter(tasks), workers, lambda n: bar.update(n * length), faults.extend
        )
    return sorted(faults)


def _stream_tasks(
    out: Path, stream: str, files: list[dict[str, Any]], manifest: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        entries = json.loads((out / stream / "index.json").read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{stream}/index.json: cannot be read ({error})"], []
    faults = []
    if len(entries) != len(files):
        faults.append(f"{stream}/index.json: {len(entries)} shards, the manifest has {len(files)}")
    expected = {Path(file["file"]).name for file in files} | {"index.json"}
    strange = sorted({path.name for path in (out / stream).iterdir()} - expected)
    faults += [f"{stream}/{name}: not in the manifest" for name in strange]
    size = manifest["tokenizer"]["vocabulary_size"]
    tasks = [
        file | {"name": file["file"], "path": str(out / file["file"]), "entry": entry, "size": size}
        for file, entry in zip(files, entries, strict=False)
    ]
    return faults, tasks


def check_shard_file(task: dict[str, Any], report_progress: Any) -> list[str]:
    """Check one shard's bytes, header, number of sequences and tokens.

    Args:
        task: of the manifest: file, sequences, bytes, sha256; and `path`, `entry` of index.json,
            `size` of the vocabulary.
        report_progress: called with the sequences checked.
    """
    try:
        content = Path(task["path"]).read_bytes()
    except OSError as error:
        return [f"{task['file']}: cannot be read ({error.strerror})"]
    report_progress(task["sequences"])
    if len(content) != task["bytes"]:
        return [f"{task['file']}: {len(content)} bytes, the manifest has {task['bytes']}"]
    if hashlib.sha256(content).hexdigest() != task["sha256"]:
        return [f"{task['file']}: its bytes have changed (sha256)"]
    try:
        tokens = shards.decode_shard(content, task["entry"])
    except ValueError as error:
        return [f"{task['file']}: {error}"]
    if len(tokens) != task["sequences"]:
        return [f"{task['file']}: {len(tokens)} sequences, not {task['sequences']}"]
    if tokens.size and int(tokens.max()) >= task["size"]:
        return [f"{task['file']}: token {int(tokens.max())} is not in the vocabulary"]
    return []


def check_counts(manifest: dict[str, Any]) -> list[str]:
    """Check that the manifest accounts for every document and token.

    Args:
        manifest: of a finished preparation.
    """
    faults, length = [], manifest["options"]["sequence_length"]
    for domain, read in manifest["read"].items():
        splits = [domains[domain] for domains in manifest["splits"].values()]
        tokens = sum(split["tokens"] for split in splits) + sum(read[name] for name in READ)
        if tokens != read["tokens"]:
            faults.append(f"manifest.json: {domain}: {tokens} of {read['tokens']} tokens")
        left_out = ("not_tokenised", "duplicates", "beyond_budget")
        documents = sum(split["documents"] for split in splits)
        documents += sum(read[f"documents_{name}"] for name in left_out)
        if documents != read["documents"]:
            faults.append(f"manifest.json: {domain}: {documents} of {read['documents']} documents")
    for split, domains in manifest["splits"].items():
        for domain, n in domains.items():
            written = n["sequences"] * length
            if n["tokens"] != written + n["tokens_left_over"] + n["tokens_beyond_budget"]:
                faults.append(f"manifest.json: {split}/{domain}: tokens do not add up")
            files = manifest["shards"].get(f"{split}/{domain}", [])
            if sum(file["sequences"] for file in files) != n["sequences"]:
                faults.append(f"manifest.json: {split}/{domain}: shards do not add up")
    return faults
