"""Read a finished preparation again and compare it with its manifest."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from apex_composer.data_prep.engines.engine import Engine, MapTasks
from apex_composer.data_prep.paths import MANIFEST, STREAMS, UPLOADED, WORK
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.write.manifest import (
    Manifest,
    hash_content,
    output_files,
    read_finished,
)

# Not accounted for by the manifest: they are its own, or change when the output is moved.
FREE = (MANIFEST, STREAMS, UPLOADED)
READ_AT_ONCE = 1 << 24


def verify(
    out: Path | str,
    *,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
) -> list[str]:
    """Check every byte and every count of a preparation.

    Args:
        out: folder that `prepare` was given.
        workers: tasks at the same time. Default: one for each core.
        engine: who does the work: `local` or `ray`. Default: "local".
        address: that of the Ray cluster, see `Engine`. Default: None.

    Returns:
        What is wrong, one line each; empty when all is well.

    Raises:
        SettingsError: there is no finished preparation.
    """
    out, chosen = Path(out), Engine(engine, address, workers)
    manifest = read_finished(out)
    if manifest.get("sha256") != hash_content(manifest):
        return [f"{MANIFEST}: it was changed after it was written (sha256), so nothing is checked"]
    hashes = output_files(manifest)
    faults = check_counts(manifest) + check_names(out, list(hashes))
    if not (out / STREAMS).is_file():
        faults.append(f"{STREAMS}: is missing")
    with chosen.opened(out, MANIFEST) as map_tasks:
        return sorted(faults + check_files(out, hashes, map_tasks))


def check_files(out: Path, hashes: dict[str, str], map_tasks: MapTasks) -> list[str]:
    """Compare files with their hashes; what is wrong, one line each.

    Args:
        hashes: sha256 by the file's path in the output.
        map_tasks: that of an engine.
    """
    faults: list[str] = []
    tasks = [
        {"name": name, "path": str(out / name), "sha256": sha256} for name, sha256 in hashes.items()
    ]
    with progress_bar(total=len(tasks), unit=" files", desc="verifying") as bar:
        for _, found in map_tasks(check_file, tasks, bar.update, len(tasks)):
            faults += found
    return faults


def check_file(task: dict[str, str], report_progress: Callable[[int], None]) -> list[str]:
    """Compare a file with its hash.

    Args:
        task: `name`, `path` and `sha256`.
        report_progress: called with the number of files checked.
    """
    digest = hashlib.sha256()
    try:
        with Path(task["path"]).open("rb") as file:
            while chunk := file.read(READ_AT_ONCE):
                digest.update(chunk)
    except OSError as error:
        return [f"{task['name']}: cannot be read ({error.strerror})"]
    finally:
        report_progress(1)
    same = digest.hexdigest() == task["sha256"]
    return [] if same else [f"{task['name']}: its bytes have changed (sha256)"]


def check_names(out: Path, names: list[str], free: tuple[str, ...] = FREE) -> list[str]:
    """Files that the manifest does not have; what is wrong, one line each.

    Args:
        names: files that it has.
        free: files that need not be in it.
    """
    # streaming leaves the decompressed shard beside a compressed one that it has read.
    known = {*free, *names, *(name.removesuffix(".zstd") for name in names)}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    strange = {name for name in found - known if not name.startswith(f"{WORK}/")}
    return [f"{name}: not in the manifest" for name in strange]


def missing_shards(out: Path, manifest: Manifest) -> list[str]:
    """Shards that are not there, or not of the size that the manifest has; without reading them."""
    sizes = {shard["file"]: shard["bytes"] for s in manifest["shards"].values() for shard in s}
    return [
        name
        for name, size in sizes.items()
        if not (out / name).is_file() or (out / name).stat().st_size != size
    ]


def check_counts(manifest: Manifest) -> list[str]:
    """Check that the manifest accounts for every document and token; what is wrong, in lines."""
    faults: list[str] = []

    def compare(where: str, what: str, found: int, expected: int) -> None:
        if found != expected:
            faults.append(f"{MANIFEST}: {where}: {found} of {expected} {what}")

    for domain, read in manifest["read"].items():
        splits = [domains[domain] for domains in manifest["splits"].values()]
        for what, left_out in (
            ("tokens", ("duplicates", "beyond_budget")),
            ("documents", ("not_tokenised", "duplicates", "beyond_budget")),
        ):
            found = sum(split[what] for split in splits)
            found += sum(read[f"{what}_{reason}"] for reason in left_out)
            compare(domain, what, found, read[what])
    for split, domains in manifest["splits"].items():
        for domain, counts in domains.items():
            stream = f"{split}/{domain}"
            written = counts["sequences"] * manifest["options"]["sequence_length"]
            left = counts["tokens_left_over"] + counts["tokens_beyond_budget"]
            compare(stream, "tokens", written + left, counts["tokens"])
            in_shards = sum(s["sequences"] for s in manifest["shards"].get(stream, []))
            compare(stream, "sequences", in_shards, counts["sequences"])
    return faults
