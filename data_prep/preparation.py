"""The whole preparation: plan, phase 1 in pieces, phase 2 in shards, manifest."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apex_composer.data_prep import manifest as manifests
from apex_composer.data_prep import shards, write
from apex_composer.data_prep.files import explain_full_disk, write_bytes, write_json, write_text
from apex_composer.data_prep.manifest import MANIFEST, STREAMS, TOKENIZER_FOLDER, read_manifest
from apex_composer.data_prep.options import Options, SettingsError, read_options
from apex_composer.data_prep.plan import (
    PLAN,
    WORK,
    Plan,
    check_same,
    describe_source,
    make_plan,
    read_plan,
    source_differences,
    write_plan,
)
from apex_composer.data_prep.pool import run_tasks
from apex_composer.data_prep.progress import ReadingBar, token_bar
from apex_composer.data_prep.readers import Source, find_sources
from apex_composer.data_prep.sequences import token_type
from apex_composer.data_prep.tokenise import REJECTS, tokenise_piece
from apex_composer.data_prep.tokenizer import load_tokenizer

EXAMPLES_SHOWN = 20


def prepare(
    input: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str,
    options: Options | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
) -> dict[str, Any] | None:
    """Turn RedPajama-format text into `<out>/<split>/<domain>/` MDS shards.

    The output's bytes depend on the input and the options only. A run that was ended at any moment
    is continued by the same call, without redoing finished pieces and shards. With more than one
    worker a script needs `if __name__ == "__main__":` around the call.

    Args:
        input: folder or remote address, see `find_sources`.
        out: folder to write: shards, `tokenizer/`, `streams.yaml`, `rejects.jsonl`,
            `manifest.json` (last).
        tokenizer: folder, or name on the hub, of a tokenizer with a fast version.
        options: what to do. Default: Options().
        workers: processes. Default: one for each core.
        shard: (i, n), counted from 1: do only this part of phase 1, for `merge` to finish.
            Default: None.
        overwrite: remove an earlier preparation first, finished or not. Default: False.
        keep_work: keep `<out>/.work`. Default: False.

    Returns:
        The manifest, or None with `shard`.

    Raises:
        SettingsError: the options do not fit together or to the preparation in `out`.
        FileNotFoundError: there is no input.
        FileExistsError: `out` holds something else.
        OSError: the input cannot be read or the disk is full.
        ValueError: too many lines are unusable, or there is too little text.
        WorkerDiedError: a worker was killed.
    """
    out, options = Path(out), options or Options()
    workers = check_workers(workers)
    check_shard(shard)
    sources = find_sources(input, options.format)
    with tempfile.TemporaryDirectory(prefix="apex-prep-") as folder:
        description = load_tokenizer(str(tokenizer), Path(folder))
        if options.tokenizer_training:
            description["name"] = "trained on this data"
        if overwrite and _is_ours(out):
            shutil.rmtree(out)
        finished = open_target(out, options, sources, description)
        if finished is not None:
            shutil.rmtree(out / WORK, ignore_errors=True)
            return finished
        # First, so that a run killed right here is known for ours.
        (out / WORK).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(folder).iterdir()):
            write_bytes(out / TOKENIZER_FOLDER / path.name, path.read_bytes())
    with locked(out, shard):
        plan = read_plan(out)
        if plan is None:
            tokenizer_file = out / TOKENIZER_FOLDER / "tokenizer.json"
            plan = make_plan(sources, options, description, tokenizer_file)
            write_plan(out, plan)
        tokenise_pieces(out, plan, workers, shard)
        check_unchanged(plan, sources)
        if shard is not None:
            return None
        return finish(out, plan, options, workers, keep_work)


def merge(
    out: Path | str,
    *,
    workers: int | None = None,
    max_reject_rate: float | None = None,
    keep_work: bool = False,
) -> dict[str, Any]:
    """Finish a preparation whose pieces were made by an array job.

    Args:
        out: folder that every `prepare(..., shard=...)` was given.
        workers: processes. Default: one for each core.
        max_reject_rate: in place of that of the array job. Default: None.
        keep_work: keep `<out>/.work`. Default: False.

    Returns:
        The manifest.

    Raises:
        SettingsError: there is no preparation, or a part of the array job is not done.
        Otherwise as `prepare`.
    """
    out, workers = Path(out), check_workers(workers)
    plan = read_plan(out)
    if plan is None:
        finished = read_manifest(out)
        if finished is not None:
            return finished
        raise SettingsError(
            f"out={str(out)!r} holds no preparation to merge. Give the folder that "
            "`apex-composer prep --shard` wrote."
        )
    missing = missing_pieces(out, plan)
    if missing:
        raise SettingsError(
            f"{len(missing)} of {len(plan['pieces'])} pieces are not done (the first is number "
            f"{missing[0]}). Give every part of the array job again: finished pieces are skipped. "
            f"With --shard I/N, piece P is done by I = P % N + 1."
        )
    options = read_options(plan["options"], max_reject_rate=max_reject_rate)
    with locked(out, None):
        return finish(out, plan, options, workers, keep_work)


def check_unchanged(plan: Plan, sources: list[Source]) -> None:
    """Refuse input that was written to while it was read.

    Args:
        plan: of the preparation.
        sources: input files.

    Raises:
        ValueError: a file differs from what it was when the run began; the message names it.
    """
    changes = source_differences(plan["sources"], [describe_source(s) for s in sources])
    if changes:
        raise ValueError(
            f"The input changed while it was read: {'; '.join(changes[:5])}. Start over with "
            "--overwrite when it is complete."
        )


def check_workers(workers: int | None) -> int:
    """Number of processes, by default one for each core that this process may use.

    Args:
        workers: as given, or None.

    Raises:
        SettingsError: it is below 1.
    """
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers < 1:
        raise SettingsError(f"workers={workers} must be at least 1.")
    return workers


def check_shard(shard: tuple[int, int] | None) -> None:
    """Refuse a part of an array job that does not exist.

    Args:
        shard: (i, n), counted from 1, or None.

    Raises:
        SettingsError: i is not in 1 to n.
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise SettingsError(f"shard={shard[0]}/{shard[1]} must be I/N with I from 1 to N.")


def open_target(
    out: Path, options: Options, sources: list[Source], tokenizer: dict[str, Any]
) -> dict[str, Any] | None:
    """Find out what the output folder holds: nothing, the beginning, or all of this preparation.

    Args:
        out: output folder.
        options: of the preparation.
        sources: its input.
        tokenizer: its tokenizer.

    Returns:
        The manifest when all is done, else None.

    Raises:
        SettingsError: it holds a preparation with other options, tokenizer or input.
        FileExistsError: it holds something else.
    """
    if not out.exists():
        return None
    finished, plan = read_manifest(out), read_plan(out)
    for earlier in (finished, plan):
        if earlier is not None:
            check_same(earlier, options, sources, tokenizer, out)
    if not _is_ours(out) and any(out.iterdir()):
        raise FileExistsError(
            f"out={str(out)!r} exists and was not written by this command. "
            "Give a folder that does not exist."
        )
    return finished


def _is_ours(out: Path) -> bool:
    return (out / WORK).is_dir() or (out / MANIFEST).is_file()


@contextmanager
def locked(out: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Keep a second process off the same work; the lock ends with the process that holds it.

    Args:
        out: output folder.
        shard: part of the array job, or None.

    Raises:
        FileExistsError: another process is at it.
    """
    name = "lock" if shard is None else f"lock-{shard[0]}-of-{shard[1]}"
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"out={str(out)!r} is being written by another process. Wait for it, end it, or "
                "give another folder."
            ) from error
        yield


def missing_pieces(out: Path, plan: Plan) -> list[int]:
    """Numbers of the pieces that are not done.

    Args:
        out: output folder.
        plan: of the preparation.
    """
    numbers = range(len(plan["pieces"]))
    return [number for number in numbers if not write.piece_folder(out, number).is_dir()]


def tokenise_pieces(
    out: Path, plan: Plan, workers: int, shard: tuple[int, int] | None = None
) -> None:
    """Phase 1: make all pieces that do not exist yet.

    Args:
        out: output folder.
        plan: of the preparation.
        workers: processes.
        shard: (i, n) to make every n-th piece only. Default: None.
    """
    part, parts = shard or (1, 1)
    todo = [number for number in missing_pieces(out, plan) if number % parts == part - 1]
    if not todo:
        return
    tasks = [_piece_task(out, plan, number) for number in todo]
    ours = [n for n in range(len(plan["pieces"])) if n % parts == part - 1]
    done_bytes = sum(_piece_bytes(plan, n) for n in set(ours) - set(todo))
    bar = ReadingBar([(t["source"]["path"], _piece_bytes(plan, t["number"])) for t in tasks],
                     done_bytes)  # fmt: skip
    whole = False
    sizes = {task["folder"]: _piece_bytes(plan, task["number"]) for task in tasks}
    try:
        run_tasks(
            tokenise_piece,
            iter(tasks),
            min(workers, len(tasks)),
            bar.advance,
            lambda report: bar.finish_piece(report | {"bytes": sizes[report["folder"]]}),
        )
        whole = True
    finally:
        bar.close(whole)


def _piece_bytes(plan: Plan, number: int) -> int:
    source, start, stop = plan["pieces"][number]
    return (plan["sources"][source]["bytes"] if stop is None else stop) - start


def _piece_task(out: Path, plan: Plan, number: int) -> dict[str, Any]:
    index, start, stop = plan["pieces"][number]
    source, tokenizer = plan["sources"][index], plan["tokenizer"]
    span = "" if start == 0 and stop is None else f" bytes {start}-{stop or 'end'}"
    return {
        "name": f"{source['path']}{span}",
        "number": number,
        "folder": str(write.piece_folder(out, number)),
        "source": source,
        "start": start,
        "stop": stop,
        "kept": plan["kept"],
        "tokenizer_file": str(out / TOKENIZER_FOLDER / "tokenizer.json"),
        "bos": tokenizer["bos"],
        "eos": tokenizer["eos"],
        "dtype": token_type(tokenizer["vocabulary_size"]),
    }


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
    corpus = write.read_corpus(out, plan)
    check_rejects(out, plan, corpus, options.max_reject_rate)
    codes, wanted = write.select(corpus, plan, options)
    streams = write.make_streams(corpus, codes, wanted, options.sequence_length)
    write.check_streams(streams, options.sequence_length)
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
    corpus: write.Corpus,
    streams: list[write.Stream],
    options: Options,
    workers: int,
) -> list[dict[str, Any]]:
    tokens = sum(stream.sequences for stream in streams) * options.sequence_length
    size = plan["tokenizer"]["vocabulary_size"]
    records: list[dict[str, Any]] = []
    with token_bar(tokens, "writing shards") as bar:
        run_tasks(
            write.write_shard,
            write.shard_tasks(out, corpus, streams, options, size),
            # Starting a worker costs more than writing one shard.
            min(workers, 1 + 2 * tokens // options.shard_bytes),
            lambda news: bar.update(news["tokens"]),
            records.append,
        )
    return records


def check_rejects(out: Path, plan: Plan, corpus: write.Corpus, max_reject_rate: float) -> None:
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
            with (write.piece_folder(out, number) / REJECTS).open("rb") as piece:
                shutil.copyfileobj(piece, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    rejected = sum(sum(report["rejects"].values()) for report in corpus.reports)
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
