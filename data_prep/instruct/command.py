"""The command `prep-instruct`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from apex_composer.data_prep.instruct.manifest import make_tables, read_instruct_manifest
from apex_composer.data_prep.instruct.options import InstructOptions
from apex_composer.data_prep.instruct.preparation import prepare_instruct
from apex_composer.data_prep.instruct.verify import verify_instruct
from apex_composer.data_prep.write.verify import verify


def verify_any(out: Path, **how: Any) -> list[str]:
    """As `verify`, of what `prep` or `prep-instruct` wrote, whichever it was."""
    is_instruct = read_instruct_manifest(out) is not None
    return (verify_instruct if is_instruct else verify)(out, **how)


def prep_instruct_command(
    input: Annotated[
        Path, typer.Argument(help="A .jsonl[.zst|.gz] of chats or prompts, or a folder of such.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of a fast tokenizer.")],
    sequence_length: Annotated[
        int, typer.Option("--seq-len", help="Tokens of an example at most: max_seq_len.")
    ] = 4096,
    validation_share: Annotated[
        float, typer.Option("--val-share", help="Part of the examples to hold out, 0 for none.")
    ] = 0.01,
    chat_template: Annotated[
        str | None,
        typer.Option(help="tulu, or a file; default: the tokenizer's, tulu where it has none."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Tasks at the same time; default: one for each core.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray for all nodes of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, see prep; default: this machine.")
    ] = None,
    max_reject_rate: Annotated[float, typer.Option(help="Allowed share of bad lines.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over.")] = False,
) -> None:
    """Turn chats into jsonl for llm-foundry's finetuning loader, some of them held out.

    Exit status: 0 done, 1 the data or the disk is at fault, 2 the command line is.
    """
    options = InstructOptions(
        sequence_length=sequence_length,
        validation_share=validation_share,
        chat_template=chat_template,
        max_reject_rate=max_reject_rate,
    )
    manifest = prepare_instruct(
        input,
        out,
        tokenizer=tokenizer,
        options=options,
        workers=workers,
        engine=engine,
        address=address,
        overwrite=overwrite,
    )
    console = Console(markup=False, emoji=False)  # a source may be called [x] or :x:
    for table in make_tables(manifest):
        console.print(table)
    typer.echo(f"written: {out}; unusable lines are listed in {out}/rejects.jsonl")
    typer.echo(
        f"for a training YAML (docs/instruct.md): hf_name: {out}, max_seq_len: {sequence_length}, "
        f"tokenizer.name: {out}/tokenizer"
    )
