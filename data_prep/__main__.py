"""Command line: `python -m apex_composer.data_prep DATA --out OUT`."""

from pathlib import Path
from typing import Annotated

import typer
from apex_composer.data_prep import prepare

app = typer.Typer(add_completion=False)


@app.command()
def prepare_command(
    data: Annotated[Path, typer.Argument(help="Folder <data>/<domain>/**.jsonl[.zst|.gz].")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    vocabulary_size: Annotated[int, typer.Option(help="Tokens in the tokenizer.")] = 4096,
    sequence_length: Annotated[
        int, typer.Option("--seq-len", help="Tokens in a training sequence.")
    ] = 256,
    validation_share: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.05,
    pretrain_share: Annotated[
        float, typer.Option(help="Share of documents for the base model.")
    ] = 0.65,
    text_limit: Annotated[int | None, typer.Option(help="Bytes of text to read at most.")] = None,
    maximum_reject_share: Annotated[
        float, typer.Option("--max-reject-rate", help="Allowed share of unusable lines.")
    ] = 0.001,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier preparation.")] = False,
) -> None:
    """Turn RedPajama-format text into MDS token shards, with validation held out per domain."""
    try:
        manifest = prepare(
            data,
            out,
            vocabulary_size=vocabulary_size,
            sequence_length=sequence_length,
            validation_share=validation_share,
            pretrain_share=pretrain_share,
            text_limit=text_limit,
            maximum_reject_share=maximum_reject_share,
            overwrite=overwrite,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name, domains in manifest["splits"].items():
        for domain, numbers in domains.items():
            typer.echo(f"{name}/{domain}: " + ", ".join(f"{v:,} {k}" for k, v in numbers.items()))
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    app()
