"""The command lines `apex-composer branch`, `show`, `doctor` and `plan`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

branch_app = typer.Typer(add_completion=False)
show_app = typer.Typer(add_completion=False)
console = Console()

CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint file of Composer (.pt).")]


@contextmanager
def status_of_errors() -> Iterator[None]:
    """One line for what the user can repair, and exit status 1."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@branch_app.command()
def branch(
    checkpoint: CheckpointArgument,
    yaml: Annotated[Path, typer.Option(help="The YAML of the run that saved it.")],
    out: Annotated[Path, typer.Option(help="YAML to write; its name becomes the run's.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting that changes, key=value. Repeat for more."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file of --out.")] = False,
) -> None:
    """Write the YAML of a new run that goes on from a checkpoint with other settings.

    Nothing is trained and no weights are copied. The new run keeps the parent, its sha256 and what
    changed in its own checkpoints; `apex-composer show` tells.
    """
    with status_of_errors():
        with console.status("reading the checkpoint"):
            from apex_composer.runs.branch import write_branch
        written = write_branch(checkpoint, yaml, out, changes or [], overwrite=overwrite)
    point = written.point
    console.print(f"{written.yaml}: run {written.run_name!r} goes on from batch {point['batch']}")
    for key, (old, new) in point["changed"].items():
        console.print(f"  {key}: {old} -> {new}", markup=False)
    if written.keeps_stage:
        console.print(f"Stage {point['stage']} goes on with its operators and scores.")
    else:
        console.print(
            f"The operators of stage {point['stage']} are part of the weights already. A new "
            "assessment and a new stage begin there."
        )
    console.print(f"Check it: apex-composer plan {out}", soft_wrap=True)


@show_app.command()
def show(checkpoint: CheckpointArgument) -> None:
    """Show a checkpoint's stage, settings, history and lineage."""
    with status_of_errors():
        from apex_composer.runs.checkpoint_file import read_checkpoint
        from apex_composer.runs.show import make_tables

        for table in make_tables(read_checkpoint(checkpoint)):
            console.print(table)
