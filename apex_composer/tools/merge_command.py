"""The command `merge` of `apex-composer`, with light imports."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from apex_composer.tools.commands import console, status_of_errors

app = typer.Typer(add_completion=False)

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@app.command()
def merge(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints of Composer: files (.pt), folders of shards.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights. Default: the checkpoints'.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that training began with: generation settings, LoRA's base."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the model in --out.")] = False,
) -> None:
    """Write the average of a run's checkpoints as a Hugging Face model; of one, its conversion.

    Adapters (LoRA, DoRA) become part of the weights. Checkpoints are unpickled, as Composer does
    it: give only those that you trust.
    """
    with status_of_errors("merge", None):  # averaging has a bar of its own
        from apex_composer.extras import require

        require("apex-composer merge", "foundry")
        from apex_composer.tools.merge import merge as write_merged

        notes = write_merged(checkpoints, out, dtype=dtype, base=base, overwrite=overwrite)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    of = "1 checkpoint" if len(checkpoints) == 1 else f"the mean of {len(checkpoints)} checkpoints"
    console.print(f"{out}: {of}, for AutoModelForCausalLM.from_pretrained", soft_wrap=True)
