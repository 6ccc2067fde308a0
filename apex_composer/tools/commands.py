"""The commands `plan`, `doctor`, `show` and `branch` of `apex-composer`, with light imports."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from apex_composer.extras import MissingExtraError, needing

app = typer.Typer(add_completion=False)
console = Console()

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint file of Composer (.pt).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the YAML, as key=value.")]


@contextmanager
def status_of_errors(command: str, waiting: str | None) -> Iterator[None]:
    """One line for what the user can repair; exit status 2 where a package is missing, else 1."""
    try:
        with needing(f"apex-composer {command}"):
            with console.status(waiting) if waiting else nullcontext():
                yield
    except (OSError, ValueError, TypeError, MissingExtraError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, MissingExtraError) else 1) from error


@app.command()
def branch(
    checkpoint: Checkpoint,
    yaml: Annotated[Path, typer.Option(help="The YAML of the run that saved it.")],
    out: Annotated[Path, typer.Option(help="YAML to write; its name becomes the run's.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting that changes, key=value. Repeat for more."),
    ] = None,
    cooldown: Annotated[
        str | None,
        typer.Option(help="Decay the learning rate from here and end the run, such as 2000ba."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file of --out.")] = False,
) -> None:
    """Write the YAML of a new run that goes on from a checkpoint with other settings.

    Nothing is trained and no weights are copied. The new run keeps the parent, its sha256 and what
    changed in its own checkpoints, and `apex-composer show` tells; a run without apex keeps it in
    the YAML only.
    """
    with status_of_errors("branch", "reading the checkpoint"):
        from apex_composer.tools.branch import write_branch
    with status_of_errors("branch", None):  # hashing has a bar of its own
        written = write_branch(
            checkpoint, yaml, out, changes or [], cooldown=cooldown, overwrite=overwrite
        )
    point = written.point
    console.print(f"{out}: run {written.run_name!r} goes on from batch {point['batch']}")
    for key, (old, new) in point["changed"].items():
        console.print(f"  {key}: {old} -> {new}", markup=False)
    if written.keeps_stage is None:
        console.print(
            "A run without apex: where it comes from stands in its YAML (metadata.lineage), not in "
            "its checkpoints."
        )
    elif written.keeps_stage:
        console.print(f"Stage {point['stage']} goes on with its operators and scores.")
    else:
        console.print(
            f"The operators of stage {point['stage']} are part of the weights already. A new "
            "assessment and a new stage begin there."
        )
    console.print(f"Check it: apex-composer plan {out}", soft_wrap=True)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A checkpoint of Composer (.pt), or a YAML.")],
    overrides: Overrides = None,
) -> None:
    """Show a checkpoint's stage, settings, history and lineage, or print a YAML with its defaults.

    The YAML printed is complete, for llm-foundry's own train.py, which does not know `defaults`.
    """
    if file.suffix in (".yaml", ".yml"):
        with status_of_errors("show with a YAML", None):
            from omegaconf import OmegaConf

            from apex_composer.tools.yaml_defaults import read_yaml

            complete = OmegaConf.to_yaml(read_yaml(file, overrides or []))
        typer.echo(complete, nl=False)
        return
    with status_of_errors("show", "reading the checkpoint"):
        from apex_composer.tools.checkpoint_file import read_checkpoint
        from apex_composer.tools.show import make_tables

        if overrides:
            raise ValueError(f"{' '.join(overrides)}: changes are for a YAML, and {file} is none")
        tables = make_tables(read_checkpoint(file))
    console.print(*tables)


@app.command()
def plan(
    yaml: Annotated[Path, typer.Argument(help="A training YAML of llm-foundry.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run, all nodes together.")] = 8,
    gpu: Annotated[str, typer.Option(help="GPU for the time, a name of Composer's table.")] = (
        "h100-sxm"
    ),
    # llm-foundry's own 1B model at the YAMLs' context reaches 0.40 on H100, 0.59 on A100 (README).
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Assumed share of the GPU's peak.")
    ] = 0.4,
) -> None:
    """Show what a YAML will do: stages, learning rates, units, cost, checkpoints, time.

    Nothing is trained and no weights are read. Exit status 1 where the run would fail.
    """
    with status_of_errors("plan", "loading llm-foundry"):
        import warnings

        warnings.simplefilter("ignore")
        from apex_composer.tools.plan import make_plan
        from apex_composer.tools.plan_tables import make_plan_tables
        from apex_composer.tools.training_yaml import load_configuration

        planned = make_plan(load_configuration(yaml, overrides or []), gpus)
        tables = make_plan_tables(planned, gpu, mfu)
    console.print(*tables)
    for problem in planned.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if planned.problems:
        raise typer.Exit(1)


@app.command()
def doctor(
    yaml: Annotated[
        Path | None, typer.Argument(help="A training YAML: its data, model and disk, too.")
    ] = None,
    overrides: Overrides = None,
    clean: Annotated[
        bool, typer.Option(help="Offer to remove what killed runs left in /dev/shm.")
    ] = False,
) -> None:
    """Look whether this machine is ready to train. Exit status 1 where it is not.

    Nothing is started and nothing changed, but for --clean, which asks first.
    """
    with status_of_errors("doctor" if yaml is None else "doctor with a YAML", "looking"):
        from apex_composer.tools.doctor import examine
        from apex_composer.tools.finding import make_table
        from apex_composer.tools.training_yaml import load_configuration

        config = None if yaml is None else load_configuration(yaml, overrides or [])
        findings = list(examine(config))
    console.print(make_table(findings))
    if clean:
        offer_to_clean()
    if any(finding.status == "failure" for finding in findings):
        raise typer.Exit(1)


def offer_to_clean() -> None:
    """Name streaming's segments without an owner, and remove them if the user agrees."""
    from apex_composer.tools.shared_memory import find_stale, remove_stale, sees_all_processes

    stale, _ = find_stale()
    if not stale:
        console.print("/dev/shm: nothing to remove")
        return
    for path in stale:
        console.print(f"  {path}")
    if not sees_all_processes():
        console.print(
            "This is a container: a run in another container that shares /dev/shm is not seen from "
            "here, and would look like no owner.",
            style="yellow",
        )
    if typer.confirm(f"Remove these {len(stale)} segments?", default=False):
        console.print(f"{len(remove_stale(stale))} removed")
