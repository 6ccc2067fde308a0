"""Command line: `python -m apex_composer.data_prep prep INPUT --out OUT --tokenizer NAME`."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from apex_composer.data_prep import Options, merge, prepare, upload
from apex_composer.data_prep.choose.proportions import read_proportions
from apex_composer.data_prep.dry_run import check_needs, describe_needs, estimate_preparation
from apex_composer.data_prep.errors import SettingsError, WorkerDiedError
from apex_composer.data_prep.instruct.command import prep_instruct_command, verify_any
from apex_composer.data_prep.options import parse_amount
from apex_composer.data_prep.write.upload import check_address
from apex_composer.extras import MissingExtraError

OutArgument = Annotated[Path, typer.Argument(help="Folder that `apex-composer prep` wrote.")]
Workers = Annotated[
    int | None, typer.Option(help="Tasks at the same time; default: one for each core.")
]
Engine = Annotated[str, typer.Option(help="local, or ray for all nodes of a Ray cluster.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, HOST:6379 or ray://HOST:10001; default: this machine."),
]
Upload = Annotated[
    str | None,
    typer.Option("--upload", help="Address to copy the result to, such as s3://bucket/folder."),
]
KeepWork = Annotated[bool, typer.Option(help="Keep <out>/.work when all is done.")]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@contextmanager
def status_of_errors() -> Iterator[None]:
    """One line for an error; status 1 for data or disk, 2 for what was asked or is missing."""
    try:
        yield
    except KeyboardInterrupt:
        message = "interrupted. Give the same command again: finished pieces and shards are kept."
        typer.echo(f"\n{message}", err=True)
        # Threads of libraries would be waited for otherwise.
        os._exit(128 + signal.SIGINT)
    except (SettingsError, MissingExtraError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, ValueError, MemoryError, WorkerDiedError) as error:
        typer.echo(f"error: {error or 'memory ran out: use fewer --workers.'}", err=True)
        raise typer.Exit(1) from error


@app.command("prep")
def prep_command(
    input: Annotated[
        str, typer.Argument(help="Folder of RedPajama, or of <domain>/**.jsonl[.zst|.gz].")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of a fast tokenizer.")],
    sequence_length: Annotated[int, typer.Option("--seq-len", help="Tokens per sequence.")] = 4096,
    format: Annotated[
        str,
        typer.Option(
            help="auto, redpajama-v1, -sample or -v2, slimpajama, jsonl, fineweb, dolma or arrow."
        ),
    ] = "auto",
    val_tokens: Annotated[str, typer.Option(help="Tokens held out, 0 for none.")] = "2M",
    val_per_domain: Annotated[
        bool, typer.Option("--val-per-domain", help="--val-tokens for every domain.")
    ] = False,
    train_tokens: Annotated[
        str | None, typer.Option(help="Tokens of `train`, such as 4B; default: all that is left.")
    ] = None,
    cpt_tokens: Annotated[
        str | None, typer.Option(help="Tokens of `cpt`, such as 10B; default: no such split.")
    ] = None,
    proportions: Annotated[
        str, typer.Option(help="llama1, equal, or a JSON or YAML file {domain: number}.")
    ] = "llama1",
    compression: Annotated[str | None, typer.Option(help="zstd, or nothing.")] = None,
    workers: Workers = None,
    engine: Engine = "local",
    address: Address = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: one part of an array job; then prep-merge.")
    ] = None,
    max_reject_rate: Annotated[float, typer.Option(help="Allowed share of bad lines.")] = 0.001,
    estimate_margin: Annotated[
        float, typer.Option(help="Tokenise this many times what the budgets should need.")
    ] = 1.3,
    shard_size: Annotated[str, typer.Option(help="Bytes of an MDS shard at most.")] = "67108864",
    piece_size: Annotated[str, typer.Option(help="Bytes of input of one task.")] = "67108864",
    streams_folder: Annotated[
        str | None, typer.Option(help="Folder of the shards in streams.yaml; default: OUT.")
    ] = None,
    upload_to: Upload = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over.")] = False,
    keep_work: KeepWork = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate tokens, disk and time; write nothing.")
    ] = False,
) -> None:
    """Turn RedPajama into MDS token shards, with a validation set held out.

    Exit status: 0 done, 1 the data or the disk is at fault, 2 the command line or the installation.
    """
    with status_of_errors():
        if train_tokens is not None and _amount(train_tokens) is None and not _amount(cpt_tokens):
            raise SettingsError(
                f"train_tokens={train_tokens!r} without --cpt-tokens leaves no training data. Give "
                "a budget, or leave --train-tokens out to take all."
            )
        options = Options(
            sequence_length=sequence_length,
            format=format,
            val_tokens=_amount(val_tokens),
            val_per_domain=val_per_domain,
            train_tokens=_amount(train_tokens),
            cpt_tokens=_amount(cpt_tokens),
            proportions=read_proportions(proportions),
            max_reject_rate=max_reject_rate,
            compression=compression,
            shard_bytes=parse_amount(shard_size),
            piece_bytes=parse_amount(piece_size),
            estimate_margin=estimate_margin,
            streams_folder=streams_folder,
        )
        given: dict[str, Any] = {"tokenizer": tokenizer, "options": options, "workers": workers}
        if dry_run:
            needs = estimate_preparation(input, out, **given)
            typer.echo("\n".join(describe_needs(needs)))
            check_needs(needs, out)
            return
        part = _parse_part(shard)
        if upload_to is not None:
            check_address(upload_to)
        given |= {"engine": engine, "address": address, "shard": part}
        manifest = prepare(input, out, overwrite=overwrite, keep_work=keep_work, **given)
        if manifest is None:
            typer.echo(f"part {shard} is done. When all are: apex-composer prep-merge {out}")
        else:
            _show(manifest, out, upload_to)


@app.command("prep-merge")
def merge_command(
    out: OutArgument,
    workers: Workers = None,
    engine: Engine = "local",
    address: Address = None,
    max_reject_rate: Annotated[
        float | None, typer.Option(help="Allowed share of bad lines; default: the array job's.")
    ] = None,
    upload_to: Upload = None,
    keep_work: KeepWork = False,
) -> None:
    """Finish an array job of `prep --shard I/N`: choose the splits and write the shards."""
    with status_of_errors():
        if upload_to is not None:
            check_address(upload_to)
        manifest = merge(
            out,
            workers=workers,
            engine=engine,
            address=address,
            max_reject_rate=max_reject_rate,
            keep_work=keep_work,
        )
        _show(manifest, out, upload_to)


@app.command("prep-verify")
def verify_command(
    out: Annotated[Path, typer.Argument(help="Folder that `prep` or `prep-instruct` wrote.")],
    workers: Workers = None,
    engine: Engine = "local",
    address: Address = None,
) -> None:
    """Read everything again and compare it with the manifest."""
    with status_of_errors():
        faults = verify_any(out, workers=workers, engine=engine, address=address)
    for fault in faults:
        typer.echo(f"error: {fault}", err=True)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{out} is as its manifest says")


app.command("prep-instruct")(status_of_errors()(prep_instruct_command))


def _amount(text: str | None) -> int | None:
    return None if text is None else parse_amount(text) or None


def _parse_part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise SettingsError(f"shard={text!r} must be I/N, such as 3/16, counted from 1.")
    return int(match[1]), int(match[2])


def _show(manifest: dict[str, Any], out: Path, address: str | None) -> None:
    for split, domains in manifest["splits"].items():
        for domain, numbers in domains.items():
            counts = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in numbers.items())
            typer.echo(f"{split}/{domain}: {counts}")
    if manifest["absent_domains"]:
        absent = ", ".join(manifest["absent_domains"])
        typer.echo(f"absent, so the others' proportions were raised: {absent}")
    rejected = sum(manifest["rejects"]["lines"].values())
    typer.echo(f"{rejected:,} unusable lines, listed in {out}/rejects.jsonl")
    typer.echo(f"written: {out}; for a training YAML: {out}/streams.yaml")
    if address is not None:
        upload(out, address)
        typer.echo(f"uploaded: {address}")


if __name__ == "__main__":
    app()
