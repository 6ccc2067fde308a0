"""The command `apex-composer report`, and the report at the end of a job, with light imports."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from apex_composer.tools.commands import status_of_errors

app = typer.Typer(add_completion=False)
console = Console()


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs; those of one name and several seeds are one group."),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Name of a run to compare with. Repeat for more, the first one first."),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Of the page; default: the runs' names.")
    ] = None,
) -> None:
    """Compare runs in one HTML file: perplexities, curves, tokens to reach, stages, speed.

    The file needs no server and no network. What a run has not kept is named in it.
    """
    with status_of_errors("report", "reading the runs"):
        from apex_composer.report.page import write_report

        answer = write_report(runs, out, baselines=baseline or [], title=title)
    console.print(answer.sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB", markup=False, soft_wrap=True)


def report_job(paths: Sequence[Path], out: Path, baselines: Sequence[str] = ()) -> str:
    """Write the report of a finished job, whose results must not be lost by it.

    Args:
        paths: folders of its runs.
        out: HTML file; an older one does not stay where this one cannot be written.
        baselines: see `write_report`.

    Returns:
        Where the report is, or why there is none and how to write it: a line for the user.
    """
    try:
        from apex_composer.report.page import write_report

        write_report(paths, out, baselines=baselines)
    except Exception as error:  # whatever it is: hours of training have gone before
        with suppress(OSError):
            out.unlink(missing_ok=True)
        command = ["apex-composer", "report", *map(str, paths), "--out", str(out)]
        command += [word for name in baselines for word in ("--baseline", name)]
        return (
            f"No report: {type(error).__name__}: {error}. The runs and their results are complete; "
            f"to write it: {shlex.join(command)}"
        )
    return f"{out}   all of it as a page: open it in a browser"
