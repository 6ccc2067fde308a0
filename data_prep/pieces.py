"""Phase 1: every piece of the input is tokenised into a folder of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.engines.engine import MapTasks
from apex_composer.data_prep.engines.local import Report
from apex_composer.data_prep.paths import PIECES, REPORT, piece_folder
from apex_composer.data_prep.progress import ReadingBar
from apex_composer.data_prep.read.remote import is_remote
from apex_composer.data_prep.tokens.piece import PROGRESS, PieceReport, PieceTask, tokenise_piece


def _piece_task(out: Path, plan: Plan, number: int) -> PieceTask:
    source, start, stop = plan.pieces[number]
    span = plan.sources[source], start, stop
    return PieceTask(out, number, *span, plan.kept, plan.tokenizer, plan.document_hash)


def write_missing(
    task: dict[str, Any],
    report_progress: Report,
    write: Callable[[Any, Report], Any],
    report: type,
) -> Any:
    """Write `task["piece"]`, unless it is there: the worker that had it may have died thereafter.

    Args:
        write: called with the piece and `report_progress`.
        report: type of what it returns.
    """
    piece = task["piece"]
    found = read_json(piece_folder(piece.out, piece.number) / REPORT)
    if found is None:
        return write(piece, report_progress)
    report_progress({name: found[name] for name in (*PROGRESS, "source")})
    return report(**found)


def missing_pieces(out: Path, plan: Plan) -> list[int]:
    """Numbers of the pieces that are not done.

    They are listed, not looked for one by one: a network file system remembers for a while that a
    name was not there, and would hide it from this machine when another one has made it.
    """
    done = {path.name for path in (out / PIECES).glob("*")}
    numbers = range(len(plan.pieces))
    return [number for number in numbers if piece_folder(out, number).name not in done]


def tokenise_pieces(
    out: Path,
    plan: Plan,
    map_tasks: MapTasks,
    part: tuple[int, int] | None,
    make_task: Callable[[Path, Plan, int], PieceTask] = _piece_task,
    write: Callable[[Any, Report], Any] = tokenise_piece,
    report: type = PieceReport,
) -> None:
    """Make all pieces that do not exist yet.

    Args:
        map_tasks: that of an engine.
        part: (i, n) to make every n-th piece only, None to make all.
        make_task: what a worker needs to know of a piece. Default: that of pre-training data.
        write: what it does with a piece. Default: `tokenise_piece`.
        report: type of what that returns. Default: PieceReport.
    """
    first, step = part or (1, 1)
    sizes = {n: _piece_bytes(plan, n) for n in range(first - 1, len(plan.pieces), step)}
    todo = [number for number in missing_pieces(out, plan) if number in sizes]
    if not todo:
        return
    pieces = {number: make_task(out, plan, number) for number in todo}
    bar = ReadingBar(
        [(piece.source.path, sizes[number]) for number, piece in pieces.items()],
        sum(sizes[number] for number in sizes.keys() - pieces.keys()),
    )
    tasks = map(_describe, pieces.values())
    work = partial(write_missing, write=write, report=report)
    whole = False
    try:
        for task, done in map_tasks(work, tasks, bar.advance, len(todo)):
            bar.finish_piece(done.source, sizes[task["piece"].number], done.characters)
        whole = True
    finally:
        bar.close(whole)


def _describe(piece: PieceTask) -> dict[str, Any]:
    path = piece.source.path
    return {"name": piece.name, "piece": piece, "input": None if is_remote(path) else path}


def _piece_bytes(plan: Plan, number: int) -> int:
    source, start, stop = plan.pieces[number]
    return (plan.sources[source].bytes if stop is None else stop) - start
