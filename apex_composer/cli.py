"""The command `apex-composer`: one name for the jobs that this package brings.

Each sub-command hands its arguments to the job's own typer app, which is imported only then, so
that `apex-composer --help` does not wait for torch.
"""

from importlib import import_module

import typer

app = typer.Typer(
    name="apex-composer",
    help="APEX training of language models on Composer: jobs around the algorithm.",
    no_args_is_help=True,
    add_completion=False,
)

# --help too is the job's to answer, so the options are described in one place only.
_PASS_ALL_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def _hand_over(
    module: str, context: typer.Context, name: str = "app", first: str | None = None
) -> None:
    """Run a job's typer app with the arguments of this command."""
    job = getattr(import_module(module), name)
    if first is None:
        job(args=context.args, prog_name=context.command_path)
    else:
        job(args=[first, *context.args], prog_name=context.parent.command_path)


@app.command(context_settings=_PASS_ALL_ON)
def demo(context: typer.Context) -> None:
    """Run the whole job on this machine: text, tokenizer, base model, then vanilla against APEX."""
    _hand_over("apex_composer.demo.__main__", context)


@app.command(context_settings=_PASS_ALL_ON)
def prep(context: typer.Context) -> None:
    """Turn RedPajama into the token shards that the YAMLs train on."""
    _hand_over("apex_composer.data_prep.__main__", context, first="prep")


@app.command(context_settings=_PASS_ALL_ON)
def prep_merge(context: typer.Context) -> None:
    """Finish an array job of `prep --shard I/N`."""
    _hand_over("apex_composer.data_prep.__main__", context, first="prep-merge")


@app.command(context_settings=_PASS_ALL_ON)
def prep_verify(context: typer.Context) -> None:
    """Read prepared data again and compare it with its manifest."""
    _hand_over("apex_composer.data_prep.__main__", context, first="prep-verify")


@app.command(context_settings=_PASS_ALL_ON)
def branch(context: typer.Context) -> None:
    """Write the YAML of a new run that goes on from a checkpoint with other settings."""
    _hand_over("apex_composer.tools.commands", context, "branch_app")


@app.command(context_settings=_PASS_ALL_ON)
def show(context: typer.Context) -> None:
    """Show a checkpoint's stage, settings, history and lineage."""
    _hand_over("apex_composer.tools.commands", context, "show_app")


@app.command(context_settings=_PASS_ALL_ON)
def plan(context: typer.Context) -> None:
    """Show what a training YAML will do, in numbers, without training."""
    _hand_over("apex_composer.tools.commands", context, "plan_app")


@app.command(context_settings=_PASS_ALL_ON)
def doctor(context: typer.Context) -> None:
    """Look whether this machine is ready to train: versions, GPU, data, disk, /dev/shm."""
    _hand_over("apex_composer.tools.commands", context, "doctor_app")


if __name__ == "__main__":
    app()
