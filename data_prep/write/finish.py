"""From finished pieces to the output: splits, shards, index files, manifest."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import (
    new_file,
    write_bytes,
    write_json,
    write_text,
)
from apex_composer.data_prep.choose import document_index as corpora
from apex_composer.data_prep.choose.document_index import Corpus, Stream
from apex_composer.data_prep.choose.job_plan import Plan
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
from apex_composer.data_prep.progress import token_bar
from apex_composer.data_prep.workers import run_tasks
from apex_composer.data_prep.write import manifest as manifests
from apex_composer.data_prep.write.index import index_files
from apex_composer.data_prep.write.manifest import read_manifest
from apex_composer.data_prep.write.shard_writer import shard_tasks, write_shard
from apex_composer.data_prep.write.verify import check_counts

EXAMPLES_SHOWN = 20


def finish(
    out: Path, plan: Plan, options: Options, workers: int, keep_work: bool
) -> dict[str, Any]:
    """Phase 2: choose the splits, write the shards, their index and the manifest.

    Args:
        out: output folder.
        plan: of the preparation.
        options: of the preparation.
        workers: processes.
        keep_work: keep `<out>/.work`.
    """
    corpus = corpora.read_corpus(out, plan)
    check_rejects(out, plan, corpus, options.max_reject_rate)
    codes, wanted = corpora.select(corpus, plan, options)
    streams = corpora.make_streams(corpus, codes, wanted, options.sequence_length)
    corpora.check_streams(streams, options)
    records = _write_shards(out, plan, corpus, streams, options, workers)
    files = {name: _describe_file(out / name) for name in _other_files(out)}
    manifest = manifests.make_manifest(plan, options, corpus, codes, streams, records, files)
    unaccounted = check_counts(manifest)
    assert not unaccounted, unaccounted
    for name, content in index_files(manifest).items():
        write_bytes(out / name, content)
    write_text(out / STREAMS, manifests.write_streams(manifest, out))
    write_json(out / MANIFEST, manifest)
    if not keep_work:
        # The plan first: what is left of the folder after a kill must not look like a beginning.
        (out / PLAN).unlink()
        shutil.rmtree(out / WORK, ignore_errors=True)
    return read_manifest(out)


def _other_files(out: Path) -> list[str]:
    tokenizer = sorted(path.name for path in (out / TOKENIZER_FOLDER).iterdir())
    return [*(f"{TOKENIZER_FOLDER}/{name}" for name in tokenizer), REJECTS]


def _describe_file(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_shards(
    out: Path,
    plan: Plan,
    corpus: Corpus,
    streams: list[Stream],
    options: Options,
    workers: int,
) -> list[dict[str, Any]]:
    tokens = sum(stream.sequences for stream in streams) * options.sequence_length
    size = plan.tokenizer.vocabulary_size
    records: list[dict[str, Any]] = []
    with token_bar(tokens, "writing shards") as bar:
        run_tasks(
            write_shard,
            shard_tasks(out, corpus, streams, options, size),
            # Starting a worker costs more than writing one shard.
            min(workers, 1 + 2 * tokens // options.shard_bytes),
            lambda news: bar.update(news["tokens"]),
            records.append,
        )
    return records


def check_rejects(out: Path, plan: Plan, corpus: Corpus, max_reject_rate: float) -> None:
    """Write `rejects.jsonl`, and refuse data with too many bad lines.

    Args:
        out: output folder.
        plan: of the preparation.
        corpus: all documents.
        max_reject_rate: allowed share of bad lines among all lines.

    Raises:
        ValueError: the share is above it; the message names the first bad lines.
    """
    path = out / REJECTS
    first = write_rejects(path, out, plan, corpus)
    rejected = sum(map(corpora.count_rejects, corpus.reports))
    lines = rejected + sum(report.documents for report in corpus.reports)
    if rejected > max_reject_rate * lines:
        shown = "\n  ".join(f"{e['file']}:{e['line']}: {e['reason']}" for e in first)
        raise ValueError(
            f"{rejected} of {lines} lines are not usable, more than "
            f"max_reject_rate={max_reject_rate} allows. The first of them:\n  {shown}\n"
            f"All are in {path}. Repair or remove these lines, or raise max_reject_rate "
            "(--max-reject-rate) and run again: finished pieces are kept."
        )


def write_rejects(path: Path, out: Path, plan: Plan, corpus: Corpus) -> list[dict[str, Any]]:
    """Join the rejects of all pieces, with lines counted from each file's first.

    Args:
        path: file to write.
        out: output folder.
        plan: of the preparation.
        corpus: all documents.

    Returns:
        The first of them.
    """
    first: list[dict[str, Any]] = []
    lines_before: Counter[int] = Counter()  # by source
    with new_file(path) as file:
        for number, (source, _, _) in enumerate(plan.pieces):
            with (piece_folder(out, number) / REJECTS).open(encoding="utf-8") as piece:
                for entry in map(json.loads, piece):
                    entry["line"] += lines_before[source]
                    file.write(json.dumps(entry).encode() + b"\n")
                    if len(first) < EXAMPLES_SHOWN:
                        first.append(entry)
            lines_before[source] += corpus.reports[number].lines
    return first
