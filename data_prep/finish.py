"""From finished pieces to the output: splits, shards, index files, manifest."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from apex_composer.data_prep import corpus as corpora
from apex_composer.data_prep import manifest as manifests
from apex_composer.data_prep import shards
from apex_composer.data_prep.corpus import Corpus, Stream, piece_folder
from apex_composer.data_prep.files import explain_full_disk, write_bytes, write_json, write_text
from apex_composer.data_prep.manifest import MANIFEST, STREAMS, read_manifest
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.plan import PLAN, WORK, Plan
from apex_composer.data_prep.pool import run_tasks
from apex_composer.data_prep.progress import token_bar
from apex_composer.data_prep.tokenise import REJECTS
from apex_composer.data_prep.write import shard_tasks, write_shard

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
    corpora.check_streams(streams, options.sequence_length)
    records = _write_shards(out, plan, corpus, streams, options, workers)
    for stream in streams:
        name = f"{stream.split}/{stream.domain}"
        ours = sorted((r for r in records if r["stream"] == name), key=lambda r: r["number"])
        index = shards.encode_index([record["entry"] for record in ours])
        write_bytes(out / name / "index.json", index)
        for killed in (out / name).glob("*.partial-*"):  # what killed runs were writing
            killed.unlink()
    for name in (STREAMS, MANIFEST, REJECTS):
        for killed in out.glob(f"{name}.partial-*"):
            killed.unlink()
    manifest = manifests.make_manifest(plan, options, corpus, codes, streams, records)
    write_text(out / STREAMS, manifests.write_streams(manifest, out))
    write_json(out / MANIFEST, manifest)
    if not keep_work:
        # The plan first: what is left of the folder after a kill must not look like a beginning.
        (out / WORK / PLAN).unlink()
        shutil.rmtree(out / WORK, ignore_errors=True)
    return read_manifest(out)


def _write_shards(
    out: Path,
    plan: Plan,
    corpus: Corpus,
    streams: list[Stream],
    options: Options,
    workers: int,
) -> list[dict[str, Any]]:
    tokens = sum(stream.sequences for stream in streams) * options.sequence_length
    size = plan["tokenizer"]["vocabulary_size"]
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
    partial = path.with_name(path.name + ".partial")
    with explain_full_disk(path), partial.open("wb") as file:
        for number in range(len(plan["pieces"])):
            with (piece_folder(out, number) / REJECTS).open("rb") as piece:
                shutil.copyfileobj(piece, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    rejected = sum(map(corpora.count_rejects, corpus.reports))
    lines = rejected + sum(report["documents"] for report in corpus.reports)
    if rejected > max_reject_rate * lines:
        with path.open(encoding="utf-8") as file:
            first = [json.loads(line) for line, _ in zip(file, range(EXAMPLES_SHOWN), strict=False)]
        shown = "\n  ".join(
            f"{e['file']}:{e['line']}: {e['reason']}"
            if "line" in e
            else f"{e['file']}, the line at byte {e['byte']}: {e['reason']}"
            for e in first
        )
        raise ValueError(
            f"{rejected} of {lines} lines are not usable, more than "
            f"max_reject_rate={max_reject_rate} allows. The first of them:\n  {shown}\n"
            f"All are in {path}. Repair or remove these lines, or raise max_reject_rate "
            "(--max-reject-rate) and run again: finished pieces are kept."
        )
