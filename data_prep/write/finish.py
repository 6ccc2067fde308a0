"""From finished pieces to the output: splits, shards, index files, manifest."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import new_file, write_bytes, write_json, write_text
from apex_composer.data_prep.choose.document_index import (
    Corpus,
    Stream,
    check_streams,
    make_streams,
    read_corpus,
    select,
)
from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.engines.engine import MapTasks
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import (
    MANIFEST,
    PLAN,
    REJECTS,
    STREAMS,
    TOKENIZER_FOLDER,
    WORK,
    piece_folder,
)
from apex_composer.data_prep.progress import progress_bar
from apex_composer.data_prep.tokens.piece import PieceReport
from apex_composer.data_prep.tokens.tokenizer import token_type
from apex_composer.data_prep.write.manifest import (
    Manifest,
    make_manifest,
    read_manifest,
    write_streams,
)
from apex_composer.data_prep.write.mds import Shard, ShardFormat, index_files
from apex_composer.data_prep.write.shard_writer import shard_tasks, write_shard
from apex_composer.data_prep.write.verify import check_counts

EXAMPLES_SHOWN = 20


def finish(
    out: Path, plan: Plan, options: Options, map_tasks: MapTasks, keep_work: bool
) -> Manifest:
    """Phase 2: choose the splits, write the shards, their index and the manifest."""
    corpus = read_corpus(out, plan)
    check_rejects(out, plan, corpus.reports, options.max_reject_rate)
    codes, wanted = select(out, corpus, plan, options)
    streams = make_streams(corpus, codes, wanted, options.sequence_length)
    check_streams(streams, options)
    dtype = token_type(plan.tokenizer.vocabulary_size)
    format = ShardFormat(dtype, options.sequence_length, options.shard_bytes, options.compression)
    shards = _write_shards(out, corpus, streams, format, map_tasks)
    for name, content in index_files(shards, format).items():
        write_bytes(out / name, content)
    tokenizer = sorted((out / TOKENIZER_FOLDER).iterdir())
    files = {
        path.relative_to(out).as_posix(): describe_file(path.read_bytes())
        for path in (*tokenizer, out / REJECTS)
    }
    manifest = make_manifest(plan, options, corpus, codes, streams, shards, files)
    unaccounted = check_counts(manifest)
    assert not unaccounted, unaccounted
    write_text(out / STREAMS, write_streams(manifest, out))
    write_json(out / MANIFEST, manifest)
    if not keep_work:
        # The plan first: what is left of the folder after a kill must not look like a beginning.
        (out / PLAN).unlink()
        shutil.rmtree(out / WORK, ignore_errors=True)
    return read_manifest(out)


def describe_file(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_shards(
    out: Path, corpus: Corpus, streams: list[Stream], format: ShardFormat, map_tasks: MapTasks
) -> dict[str, list[Shard]]:
    """The shards of every stream that has any, in their order."""
    tokens = sum(stream.sequences for stream in streams) * format.sequence_length
    # Starting a worker costs more than writing one shard.
    at_most = 1 + 2 * tokens // format.shard_bytes
    written: list[tuple[str, int, Shard]] = []
    tasks = shard_tasks(out, corpus, streams, format)
    options = {"total": tokens, "unit": " tokens", "unit_scale": True}
    with progress_bar(desc="writing shards", **options) as bar:
        for task, shard in map_tasks(write_shard, tasks, bar.update, at_most):
            # Not the task: it holds documents.
            written.append((task["stream"], task["number"], shard))
    shards: dict[str, list[Shard]] = {}
    for stream, _, shard in sorted(written, key=lambda one: one[:2]):
        shards.setdefault(stream, []).append(shard)
    return shards


def check_rejects(
    out: Path, plan: Plan, reports: list[PieceReport], max_reject_rate: float
) -> None:
    """Write `rejects.jsonl`, and refuse data with too many bad lines.

    Raises:
        ValueError: the share is above it; the message names the first bad lines.
    """
    first = _write_rejects(out, plan, reports)
    rejected = sum(report.rejected for report in reports)
    lines = rejected + sum(report.documents for report in reports)
    if rejected > max_reject_rate * lines:
        shown = "\n  ".join(f"{e['file']}:{e['line']}: {e['reason']}" for e in first)
        raise ValueError(
            f"{rejected} of {lines} lines are not usable, more than "
            f"max_reject_rate={max_reject_rate} allows. The first of them:\n  {shown}\n"
            f"All are in {out / REJECTS}. Repair or remove these lines, or raise max_reject_rate "
            "(--max-reject-rate) and run again: finished pieces are kept."
        )


def _write_rejects(out: Path, plan: Plan, reports: list[PieceReport]) -> list[dict[str, Any]]:
    """Join the rejects of all pieces, with lines counted from each file's first; the first few."""
    first: list[dict[str, Any]] = []
    lines_before: Counter[int] = Counter()  # by source
    with new_file(out / REJECTS) as file:
        for number, (source, _, _) in enumerate(plan.pieces):
            with (piece_folder(out, number) / REJECTS).open(encoding="utf-8") as piece:
                for entry in map(json.loads, piece):
                    entry["line"] += lines_before[source]
                    file.write(json.dumps(entry).encode() + b"\n")
                    if len(first) < EXAMPLES_SHOWN:
                        first.append(entry)
            lines_before[source] += reports[number].lines
    return first
