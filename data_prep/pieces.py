"""Phase 1: every piece of the input is tokenised into a folder of its own."""

from pathlib import Path
from typing import Any

from apex_composer.data_prep.choose.job_plan import Plan
from apex_composer.data_prep.paths import DOWNLOADS, TOKENIZER_FOLDER, piece_folder
from apex_composer.data_prep.progress import ReadingBar
from apex_composer.data_prep.tokens.piece import tokenise_piece
from apex_composer.data_prep.tokens.tokenizer import token_type
from apex_composer.data_prep.workers import run_tasks


def missing_pieces(out: Path, plan: Plan) -> list[int]:
    """Numbers of the pieces that are not done.

    Args:
        out: output folder.
        plan: of the preparation.
    """
    numbers = range(len(plan["pieces"]))
    return [number for number in numbers if not piece_folder(out, number).is_dir()]


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
        "folder": str(piece_folder(out, number)),
        "source": source,
        "start": start,
        "stop": stop,
        "kept": plan["kept"],
        "tokenizer_file": str(out / TOKENIZER_FOLDER / "tokenizer.json"),
        "bos": tokenizer["bos"],
        "eos": tokenizer["eos"],
        "downloads": str(out / DOWNLOADS),
        "dtype": token_type(tokenizer["vocabulary_size"]),
    }
