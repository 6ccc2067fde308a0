"""Read a finished preparation again and compare it with its manifest."""

import hashlib
from pathlib import Path
from typing import Any

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.paths import MANIFEST, STREAMS, UPLOADED, WORK
from apex_composer.data_prep.progress import token_bar
from apex_composer.data_prep.workers import check_workers, run_tasks
from apex_composer.data_prep.write import mds as shards
from apex_composer.data_prep.write.index import index_files, shard_entries
from apex_composer.data_prep.write.manifest import hash_content, read_manifest

READ = ("tokens_duplicates", "tokens_beyond_budget")
# Not accounted for by the manifest: they are its own, or change when the output is moved.
FREE = (MANIFEST, STREAMS, UPLOADED)


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
    if manifest.get("sha256") != hash_content(manifest):
        return [f"{MANIFEST}: it was changed after it was written (sha256), so nothing is checked"]
    faults = check_counts(manifest) + _check_files(out, manifest)
    tasks = _shard_tasks(out, manifest)
    workers = min(check_workers(workers), len(tasks) or 1)
    length = manifest["options"]["sequence_length"]
    tokens = sum(task["sequences"] for task in tasks) * length
    with token_bar(tokens, "verifying") as bar:
        run_tasks(
            check_shard_file, iter(tasks), workers, lambda n: bar.update(n * length), faults.extend
        )
    return sorted(faults)


def missing_shards(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Shards that are not there, or not of the size that the manifest has; without reading them.

    Args:
        out: output folder.
        manifest: of the preparation.
    """
    files = [file for entries in manifest["shards"].values() for file in entries]
    return [file["file"] for file in files if _size(out / file["file"]) != file["bytes"]]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_files(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Check everything but the shards: index files, tokenizer, rejects, and what is too many."""
    faults, expected = [], set(FREE)
    for name, content in index_files(manifest).items():
        expected.add(name)
        faults += _check_content(out / name, name, hashlib.sha256(content).hexdigest())
    for name, file in manifest["files"].items():
        expected.add(name)
        faults += _check_content(out / name, name, file["sha256"])
    for files in manifest["shards"].values():
        for file in files:
            # streaming leaves the decompressed shard beside a compressed one that it has read.
            expected |= {file["file"], file["file"].removesuffix(".zstd")}
    faults += [f"{name}: is missing" for name in (STREAMS,) if not (out / name).is_file()]
    found = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    strange = {path.as_posix() for path in found if path.parts[0] != WORK} - expected
    return faults + [f"{name}: not in the manifest" for name in strange]


def _check_content(path: Path, name: str, sha256: str) -> list[str]:
    try:
        same = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]
    return [] if same else [f"{name}: its bytes have changed (sha256)"]


def _shard_tasks(out: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    size = manifest["tokenizer"]["vocabulary_size"]
    return [
        file | {"name": file["file"], "path": str(out / file["file"]), "entry": entry, "size": size}
        for stream, files in manifest["shards"].items()
        for file, entry in zip(files, shard_entries(manifest, stream), strict=True)
    ]


def check_shard_file(task: dict[str, Any], report_progress: Any) -> list[str]:
    """Check one shard's bytes, header, number of sequences and tokens.

    Args:
        task: of the manifest: file, sequences, bytes, sha256; and `path`, `entry` as index.json has
            it, `size` of the vocabulary.
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
