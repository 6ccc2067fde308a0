"""Phase 1: every piece of the input is tokenised into a folder of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.engines.local import Work, run_tasks
from apex_composer.data_prep.paths import piece_folder
from apex_composer.data_prep.progress import ReadingBar
from apex_composer.data_prep.tokens.piece import PieceReport, PieceTask, Progress, tokenise_piece


def _work(task: dict[str, Any], report_progress: Progress) -> PieceReport:
    return tokenise_piece(task["piece"], report_progress)


def _piece_task(out: Path, plan: Plan, number: int) -> PieceTask:
    source, start, stop = plan.pieces[number]
    return PieceTask(out, number, plan.sources[source], start, stop, plan.kept, plan.tokenizer)


def missing_pieces(out: Path, plan: Plan) -> list[int]:
    """Numbers of the pieces that are not done."""
    numbers = range(len(plan.pieces))
    return [number for number in numbers if not piece_folder(out, number).is_dir()]


def tokenise_pieces(
    out: Path,
    plan: Plan,
    workers: int,
    part: tuple[int, int] | None,
    make_task: Callable[[Path, Plan, int], PieceTask] = _piece_task,
    work: Work = _work,
) -> None:
    """Make all pieces that do not exist yet.

    Args:
        part: (i, n) to make every n-th piece only, None to make all.
        make_task: what a worker needs to know of a piece. Default: that of pre-training data.
        work: what it does, with `task["piece"]`. Default: `tokenise_piece`.
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

    def finish(task: dict[str, Any], report: PieceReport) -> None:
        bar.finish_piece(report.source, sizes[task["piece"].number], report.characters)

    tasks = ({"name": piece.name, "piece": piece} for piece in pieces.values())
    whole = False
    try:
        run_tasks(work, tasks, min(workers, len(todo)), bar.advance, finish)
        whole = True
    finally:
        bar.close(whole)


def _piece_bytes(plan: Plan, number: int) -> int:
    source, start, stop = plan.pieces[number]
    return (plan.sources[source].bytes if stop is None else stop) - start
