"""Phase 1: every piece of the input is tokenised into a folder of its own."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.paths import DOWNLOADS, TOKENIZER_FOLDER, piece_folder
from apex_composer.data_prep.progress import ReadingBar
from apex_composer.data_prep.tokens.piece import PieceReport, PieceTask, Progress, tokenise_piece
from apex_composer.data_prep.tokens.tokenizer import token_type
from apex_composer.data_prep.workers import run_tasks


def missing_pieces(out: Path, plan: Plan) -> list[int]:
    """Numbers of the pieces that are not done."""
    numbers = range(len(plan.pieces))
    return [number for number in numbers if not piece_folder(out, number).is_dir()]


def tokenise_pieces(
    out: Path, plan: Plan, workers: int, shard: tuple[int, int] | None = None
) -> None:
    """Make all pieces that do not exist yet.

    Args:
        shard: (i, n) to make every n-th piece only. Default: None.
    """
    part, parts = shard or (1, 1)
    sizes = {n: _piece_bytes(plan, n) for n in range(len(plan.pieces)) if n % parts == part - 1}
    todo = [number for number in missing_pieces(out, plan) if number in sizes]
    if not todo:
        return
    pieces = {number: _piece_task(out, plan, number) for number in todo}
    bar = ReadingBar(
        [(piece.source.path, sizes[number]) for number, piece in pieces.items()],
        sum(sizes[number] for number in sizes.keys() - pieces.keys()),
    )

    def finish(result: tuple[int, PieceReport]) -> None:
        number, report = result
        bar.finish_piece(asdict(report) | {"bytes": sizes[number]})

    tasks = ({"name": p.name, "number": number, "piece": p} for number, p in pieces.items())
    whole = False
    try:
        run_tasks(_work, tasks, min(workers, len(todo)), bar.advance, finish)
        whole = True
    finally:
        bar.close(whole)


def _work(task: dict[str, Any], report_progress: Progress) -> tuple[int, PieceReport]:
    return task["number"], tokenise_piece(task["piece"], report_progress)


def _piece_bytes(plan: Plan, number: int) -> int:
    source, start, stop = plan.pieces[number]
    return (plan.sources[source].bytes if stop is None else stop) - start


def _piece_task(out: Path, plan: Plan, number: int) -> PieceTask:
    span, tokenizer = plan.pieces[number], plan.tokenizer
    return PieceTask(
        folder=piece_folder(out, number),
        source=plan.sources[span.source],
        start=span.start,
        stop=span.stop,
        kept=plan.kept,
        tokenizer_file=out / TOKENIZER_FOLDER / "tokenizer.json",
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=token_type(tokenizer.vocabulary_size),
        downloads=out / DOWNLOADS,
    )
