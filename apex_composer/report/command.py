"""The command `apex-composer report`, with light imports."""

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
