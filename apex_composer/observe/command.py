"""The command `observe` of `apex-composer`, with light imports."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from apex_composer.tools.commands import console, status_of_errors

app = typer.Typer(add_completion=False)


@app.command()
def observe(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Hugging Face folders or names, checkpoints of Composer (a .pt, or a folder of "
            "shards). Several are shown side by side."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for observe.json, tables and plots. In a run's folder `report` finds it."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Texts: jsonl (a file, or a folder per domain), or MDS as `prep` has it."
        ),
    ] = None,
    protocol: Annotated[
        Literal["sequences", "paper"],
        typer.Option(
            help="What a sample is. sequences: as training has it. paper: appendix A.1, 2,048 "
            "documents, or prompts with their answers."
        ),
    ] = "sequences",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples read at most, of all domains. Default: all.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a sample at most.")] = 2048,
    mask: Annotated[
        list[float] | None,
        typer.Option(help="Share of units to mask, such as 0.1 (table 4). Repeat for more."),
    ] = None,
    mask_by: Annotated[
        Literal["average", "rank"],
        typer.Option(help="What the strongest units are: by mean norm, or by score (eq. 3)."),
    ] = "average",
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Effective rank of every expanded weight.")
    ] = False,
    delta: Annotated[
        Path | None, typer.Option(help="The model that training began with: what has changed.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Share of units on each side, for scores and selections.")
    ] = 0.125,
    targets: Annotated[
        Literal["both", "head", "channel"], typer.Option(help="Units: heads, channels, or both.")
    ] = "both",
    plots: Annotated[
        Literal["svg", "png"] | None,
        typer.Option(help="Draw pictures of everything that was measured, in this format."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples, and random masks.")] = 17,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a forward pass.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="Where to run. Default: the GPU where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights. auto: as they are saved.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where --out is of something else.")
    ] = False,
) -> None:
    """Show what a model is: norms of its units, what masking them costs, ranks, what has changed.

    Nothing is trained and no model is changed. What is finished is kept in --out: the same command
    goes on where it was interrupted. Checkpoints are unpickled, as Composer does it: give only
    those that you trust.
    """
    with status_of_errors("observe", "loading torch"):
        from apex_composer.extras import require

        require("apex-composer observe", "foundry")
        from apex_composer.observe.observation import observe_model
        from apex_composer.observe.settings import Settings

        settings = Settings(
            data=data,
            protocol=protocol,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            threshold=threshold,
            targets=("head", "channel") if targets == "both" else (targets,),
            mask=tuple(mask or ()),
            mask_by=mask_by,
            ranks=ranks,
            delta=delta,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        settings.check()
        folders = result_folders(models, out)
    found = {}
    for place, (name, (source, folder)) in enumerate(folders.items(), start=1):
        with status_of_errors("observe", None):  # its parts have bars of their own
            found[name] = observe_model(source, folder, settings, place=place, overwrite=overwrite)
    with status_of_errors("observe", "writing tables and plots"):
        from apex_composer.observe.plots import write_plots
        from apex_composer.observe.results import write_side_by_side
        from apex_composer.observe.tables import make_tables

        write_side_by_side(out, found)
        pictures = write_plots(out, found, f".{plots}") if plots else []
    console.print(*make_tables(found))
    for _, folder in folders.values():
        console.print(f"{folder / 'observe.json'}, and its tables as .csv beside it")
    for picture in pictures:
        console.print(f"{picture}", markup=False, soft_wrap=True)


def result_folders(models: Sequence[str], out: Path) -> dict[str, tuple[str, Path]]:
    """Source and folder of the results by a short name: --out for one model, else one below it.

    Raises:
        ValueError: a model is named twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"MODELS: {' '.join(models)} names one of them twice")
    names = [os.path.basename(os.path.abspath(model)).removesuffix(".pt") for model in models]
    if len(set(names)) < len(names):  # checkpoints of several runs have the same names
        names = [f"{number}-{name}" for number, name in enumerate(names, start=1)]
    alone = len(models) == 1
    return {
        name: (model, out if alone else out / name)
        for name, model in zip(names, models, strict=True)
    }
