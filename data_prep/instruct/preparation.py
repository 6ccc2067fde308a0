"""The whole preparation of instruction data: plan, pieces, files of the splits, manifest."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from apex_composer.data_prep.atomic_files import new_file, read_json, write_bytes, write_json
from apex_composer.data_prep.choose.job_plan import DatedSource, PieceSpan, date_source, make_pieces
from apex_composer.data_prep.engines.engine import Engine
from apex_composer.data_prep.errors import InputNotFoundError, OutputTakenError, SettingsError
from apex_composer.data_prep.instruct.chat_template import save_chat_tokenizer
from apex_composer.data_prep.instruct.manifest import FORMAT, Manifest, make_manifest
from apex_composer.data_prep.instruct.options import FREE, SPLIT_FILES, InstructOptions
from apex_composer.data_prep.instruct.piece import ExamplesReport, ExamplesTask, write_piece
from apex_composer.data_prep.output_folder import check_apart, check_ours, clear, locked
from apex_composer.data_prep.paths import (
    MANIFEST,
    PLAN,
    REJECTS,
    REPORT,
    TOKENIZER_FOLDER,
    WORK,
    piece_folder,
)
from apex_composer.data_prep.pieces import tokenise_pieces
from apex_composer.data_prep.read.formats import JSONL
from apex_composer.data_prep.read.sources import Source, check_compression, list_folder
from apex_composer.data_prep.write.finish import check_rejects, describe_file
from apex_composer.extras import require

# Bytes of a file that `datasets` reads at a time; the last line of them to its end.
LINES_AT_ONCE = 10 << 20


class InstructPlan(NamedTuple):
    """What is to be read, and how: the files of the input, sorted, and their pieces."""

    options: InstructOptions
    sources: list[DatedSource]
    pieces: list[PieceSpan]


def prepare_instruct(
    input: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str,
    options: InstructOptions | None = None,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Turn jsonl of chats, or of prompts with responses, into what llm-foundry trains on.

    The output's bytes depend on the input and the options only. A run that was ended at any moment
    is continued by the same call. With more than one worker a script needs
    `if __name__ == "__main__":` around the call.

    Args:
        input: jsonl file, plain, `.gz` or `.zst`, or a folder of such.
        out: folder to write: `train.jsonl`, `validation.jsonl`, `tokenizer/` with a chat template,
            `rejects.jsonl`, `manifest.json` (last).
        tokenizer: folder, or name on the hub, of a tokenizer with a fast version.
        options: what to do. Default: InstructOptions().
        workers: tasks at the same time. Default: one for each core.
        engine: who does the work: `local` or `ray`. Default: "local".
        address: that of the Ray cluster, see `Engine`. Default: None.
        overwrite: remove an earlier preparation first, finished or not. Default: False.

    Returns:
        The manifest.

    Raises:
        SettingsError: the options do not fit together or to the preparation in `out`.
        InputNotFoundError: there is no input; a SettingsError.
        OutputTakenError: `out` holds something else, or is in use; a SettingsError.
        OSError: the input cannot be read or the disk is full.
        ValueError: too many lines are unusable, none is left, or there are both kinds.
        WorkerDiedError: a worker was killed.
    """
    require("Instruction data", "prep")
    out, options, chosen = Path(out), options or InstructOptions(), Engine(engine, address, workers)
    check_apart(input, out)
    sources = find_jsonl(Path(input))
    with tempfile.TemporaryDirectory(prefix="apex-instruct-") as folder:
        save_chat_tokenizer(str(tokenizer), options.chat_template, Path(folder))
        saved = {
            f"{TOKENIZER_FOLDER}/{path.relative_to(folder)}": path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
    settings = make_settings(options, sources, saved)
    check_target(out, settings, overwrite)  # before the lock writes anything
    with locked(out, None):
        # Again: another process may have ended its work meanwhile.
        manifest = check_target(out, settings, overwrite)
        if manifest is None:
            plan = InstructPlan(options, sources, make_pieces(sources, options.piece_bytes))
            with chosen.opened(out) as map_tasks:  # before anything is removed: it may fail
                if overwrite:
                    clear(out)
                for name, content in saved.items():
                    write_bytes(out / name, content)
                write_json(out / PLAN, {"format": FORMAT, "settings": settings})
                tokenise_pieces(out, plan, map_tasks, None, _make_task, write_piece, ExamplesReport)
            if find_jsonl(Path(input)) != sources:
                raise ValueError(
                    f"input={str(input)!r} changed while it was read. Start over with --overwrite "
                    "when it is complete."
                )
            manifest = _finish(out, plan, settings)
        # The plan first: what is left of the folder after a kill must not look like a beginning.
        (out / PLAN).unlink(missing_ok=True)
        shutil.rmtree(out / WORK, ignore_errors=True)
    return manifest


def find_jsonl(input: Path) -> list[DatedSource]:
    """Find the files of the input, sorted.

    Raises:
        InputNotFoundError: there is no jsonl.
        ValueError: jsonl is compressed in a way that is not read.
    """
    if not input.exists():
        raise InputNotFoundError(
            f"input={str(input)!r} does not exist. Give a {', '.join(JSONL)}, or a folder of such."
        )
    root, names = (input.parent, [input.name]) if input.is_file() else (input, list_folder(input))
    names = [name for name in names if not name.startswith(".") and "/." not in name]
    check_compression(str(root), names)
    names = [name for name in names if name.endswith(JSONL)]
    if not names:
        raise InputNotFoundError(
            f"input={str(input)!r} is or holds no {', '.join(JSONL)}. Datasets of the hub become "
            "one by datasets.load_dataset(NAME, split='train').to_json('train.jsonl')."
        )
    paths = [root / name for name in names]
    return [
        date_source(Source(str(path), None, "jsonl", path.stat().st_size, path.suffix == ".jsonl"))
        for path in paths
    ]


def make_settings(
    options: InstructOptions, sources: list[DatedSource], tokenizer: Mapping[str, bytes]
) -> dict[str, Any]:
    """All that decides the output's bytes.

    Args:
        options: what shall be done.
        sources: files of the input.
        tokenizer: content of its files by their names.
    """
    return {
        **{name: value for name, value in asdict(options).items() if name not in FREE},
        "tokenizer": {name: describe_file(content) for name, content in tokenizer.items()},
        "input": {s.path: {"bytes": s.bytes, "modified_ns": s.modified_ns} for s in sources},
    }


def check_target(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Manifest | None:
    """Find out what the output folder holds: nothing, the beginning, or all of this preparation.

    Returns:
        The manifest when all is done, else None.

    Raises:
        SettingsError: it holds a preparation with other settings; the message names them.
        OutputTakenError: it holds something else.
        ValueError: it holds a finished preparation that has lost files.
    """
    finished = read_json(out / MANIFEST)
    earlier = finished or read_json(out / PLAN)
    if earlier is None:
        check_ours(out)
        return None
    if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
        raise OutputTakenError(
            f"out={str(out)!r} holds something else than instruction data, or another version's. "
            "Give a folder that does not exist."
        )
    if overwrite:
        return None
    before = earlier["settings"]
    other = [
        _describe_difference(name, before.get(name), value)
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if other:
        raise SettingsError(
            f"out={str(out)!r} holds a preparation with other settings: {'; '.join(other)}. Give "
            "the same again, another --out, or --overwrite to start over."
        )
    for name, file in (finished or {"files": {}})["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != file["bytes"]:
            raise ValueError(
                f"out={str(out)!r} has a manifest, but {name} is gone or cut short. Bring it back, "
                "or give --overwrite to start over."
            )
    return finished


def _describe_difference(name: str, before: Any, now: Any) -> str:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name} was {before!r} and is now {now!r}"
    places = [place for place in {**before, **now} if before.get(place) != now.get(place)]
    return f"{name} differs in {', '.join(places[:5])}"


def _make_task(out: Path, plan: InstructPlan, number: int) -> ExamplesTask:
    source, start, stop = plan.pieces[number]
    return ExamplesTask(out, number, plan.sources[source], start, stop, plan.options)


def _finish(out: Path, plan: InstructPlan, settings: Mapping[str, Any]) -> Manifest:
    """Join the pieces, and write the manifest."""
    folders = [piece_folder(out, number) for number in range(len(plan.pieces))]
    reports = [ExamplesReport(**read_json(folder / REPORT)) for folder in folders]
    check_rejects(out, plan, reports, plan.options.max_reject_rate)
    _check_kinds(reports)
    files = {**settings["tokenizer"], REJECTS: describe_file((out / REJECTS).read_bytes())}
    for split, name in SPLIT_FILES.items():
        # The loader fails at an empty file.
        if any(split in report.counts["splits"] for report in reports):
            files[name] = _join([folder / name for folder in folders], out / name)
            check_texts(out / name)
    manifest = make_manifest(settings, reports, files)
    write_json(out / MANIFEST, manifest)
    return manifest


def _check_kinds(reports: list[ExamplesReport]) -> None:
    """The loader tells the kind of a whole file by its columns, so it must be one."""
    places = {kind: report.source for report in reports for kind in report.counts["kinds"]}
    if len(places) > 1:
        where = "; ".join(f"{kind}: {path}" for kind, path in places.items())
        raise ValueError(
            f"The input has examples of both kinds ({where}), and llm-foundry reads one kind from "
            "a folder. Prepare them apart, each with an --out of its own."
        )
    if not places:
        raise ValueError("The input has no example at all.")
    if not any("train" in report.counts["splits"] for report in reports):
        raise ValueError(
            "All examples of the input are held out for validation, none is left to train on. Give "
            "a smaller --val-share, or more data."
        )


def _join(parts: list[Path], path: Path) -> dict[str, Any]:
    """Write files one after the other into one, and describe it as `describe_file` does."""
    digest = hashlib.sha256()
    with new_file(path) as file:
        for part in parts:
            with part.open("rb") as piece:
                while chunk := piece.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def check_texts(path: Path) -> None:
    """Refuse a file in which the loader would take texts for times, and write them otherwise.

    `datasets` reads as many lines at a time, and takes a field for times when all of its texts in
    them look like it: 2020-01-01 becomes 2020-01-01 00:00:00.

    Raises:
        ValueError: it would; the message names the lines.
    """
    from pyarrow.json import ReadOptions, read_json

    first = 1
    with path.open("rb") as file:
        while lines := file.read(LINES_AT_ONCE) + file.readline():
            schema = read_json(BytesIO(lines), ReadOptions(block_size=len(lines))).schema
            last = first + lines.count(b"\n") - 1
            if "timestamp" in str(schema):
                raise ValueError(
                    f"{path}: in the lines {first} to {last} all texts of a field are dates, which "
                    "datasets reads as times (2020-01-01 becomes 2020-01-01 00:00:00). Give the "
                    "examples as messages, or others among them."
                )
            first = last + 1
