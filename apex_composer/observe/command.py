"""The command `observe` of `apex-composer`, with light imports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

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
    out: Annotated[Path, typer.Option(help="Folder for observe.json, tables and plots.")],
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
    for name, (source, folder) in folders.items():
        with status_of_errors("observe", None):  # its parts have bars of their own
            found[name] = observe_model(source, folder, settings, overwrite=overwrite)
    with status_of_errors("observe", None):
        from apex_composer.observe.results import write_deviations

        if len(found) > 1:
            write_deviations(out / "side_by_side.csv", found)
    console.print(*make_tables(found))
    for _, folder in folders.values():
        console.print(f"{folder / 'observe.json'}, and its tables as .csv beside it")


def result_folders(models: Sequence[str], out: Path) -> dict[str, tuple[str, Path]]:
    """Source and folder of the results by a short name: --out for one model, else one below it.

    Raises:
        ValueError: a model is named twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"MODELS: {' '.join(models)} names one of them twice")
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):  # checkpoints of several runs have the same names
        names = [f"{number}-{name}" for number, name in enumerate(names, start=1)]
    alone = len(models) == 1
    return {
        name: (model, out if alone else out / name)
        for name, model in zip(names, models, strict=True)
    }


def make_tables(found: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Deviations by layer, all models side by side, and each model's masking table."""
    tables = []
    if any("activations" in one for one in found.values()):
        tables.append(_deviations(found))
    tables += [_masking(name, one["masking"]) for name, one in found.items() if "masking" in one]
    return tables


def _deviations(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="deviation of the units' mean norms", title_justify="left")
    table.add_column("layer", justify="right")
    values = {
        (group["unit"], name, group["layer"]): group["std"]
        for name, one in found.items()
        for group in one["activations"]["groups"].values()
    }
    columns = [
        (unit, name)
        for unit in ("head", "channel")
        for name in found
        if any((unit, name) == key[:2] for key in values)
    ]
    for unit, name in columns:
        table.add_column(f"{unit}s" if len(found) == 1 else f"{unit}s {name}", justify="right")
    for layer in sorted({layer for *_, layer in values}):
        cells = [values.get((*column, layer)) for column in columns]
        table.add_row(str(layer), *("" if cell is None else f"{cell:.4g}" for cell in cells))
    return table


def _masking(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"masking {name}", title_justify="left")
    answered = rows[0]["exact_match"] is not None
    heads = ["masked", "units", "loss", "change", "perplexity"]
    for head in heads + ["exact match"] * answered:
        justify = "left" if head == "masked" else "right"
        table.add_column(head, justify=justify, no_wrap=head in ("masked", "change"))
    for row in rows:
        whole, error = row["which"] == "none", row["loss_change_error"]
        change = f"{row['loss_change']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
        cells = [
            "nothing" if whole else f"{row['which']} {row['share']:g}",
            str(sum(row.get(unit, 0) for unit in ("heads", "channels"))),
            f"{row['loss']:.4f}",
            "" if whole else change,
            f"{row['perplexity']:.4g}",
        ]
        table.add_row(*cells, *([f"{row['exact_match']:.1%}"] if answered else []))
    return table
