"""The command `eval` of `apex-composer`, with light imports."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apex_composer.tools.commands import console, status_of_errors

if TYPE_CHECKING:
    from apex_composer.evaluate.evaluation import Evaluation
    from apex_composer.evaluate.preset import Preset

app = typer.Typer(add_completion=False)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Hugging Face folders or names, or checkpoints of Composer."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for eval.json and eval.md.")] = Path(
        "runs/eval"
    ),
    preset: Annotated[str, typer.Option(help="cpt, instruct, or a YAML of their form.")] = "cpt",
    data_dir: Annotated[
        Path | None, typer.Option(help="Local copies of the tasks' data: nothing is fetched.")
    ] = None,
    list_files: Annotated[
        bool, typer.Option("--list-files", help="Print which files --data-dir needs, and stop.")
    ] = False,
    texts: Annotated[
        Path | None,
        typer.Option(help="Held-out text for the perplexity: jsonl or MDS, a folder per domain."),
    ] = None,
    only: Annotated[str, typer.Option(help="Tasks to run, as a,b-5; default: all.")] = "",
    skip: Annotated[str, typer.Option(help="Tasks to leave out, as a,b-5.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task, for a trial: no result.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt. Default: the model's positions.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts in the form of the model's chat template.")
    ] = False,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a sequence of --texts.")
    ] = 4096,
    device: Annotated[str | None, typer.Option(help="Default: the GPU, if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: as they are saved.")] = "auto",
    run_generated_code: Annotated[
        bool,
        typer.Option(
            "--run-generated-code",
            help="HumanEval: run programs that the model writes, with your rights on this machine.",
        ),
    ] = False,
) -> None:
    """Evaluate models on the tasks of the paper's tables, beside the paper's numbers.

    The same call goes on where it was interrupted. Exit status: 0 done, 1 not all, 2 an extra is
    missing.
    """
    with status_of_errors("eval", None):
        evaluation, chosen = _prepare(
            models or [], out, preset, only, skip, list_files,
            data_dir=data_dir, limit=limit, batch_size=batch_size, max_length=max_length,
            run_code=run_generated_code, chat=chat, texts=texts, sequence_length=sequence_length,
        )  # fmt: skip
        if evaluation is None:
            return
        failed = _run(evaluation, chosen, models or [], device=device, dtype=dtype)
    for line in failed:
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _prepare(
    models: Sequence[str], out: Path, preset: str, only: str, skip: str, list_files: bool,
    **settings: Any,
) -> tuple["Evaluation | None", "Preset"]:  # fmt: skip
    """Everything that can be refused before a model is loaded; no Evaluation: files were listed."""
    from apex_composer.extras import require

    require("apex-composer eval", "eval")
    from apex_composer.evaluate import harness

    if settings["data_dir"] is not None:
        harness.forbid_network()
    from apex_composer.evaluate.preset import choose_tasks, read_preset

    chosen = read_preset(preset)
    tasks = choose_tasks(chosen, _names(only), _names(skip))
    if list_files:
        for line in harness.list_files(tasks):
            typer.echo(line)
        return None, chosen
    if not models or not (tasks or settings["texts"]):
        raise ValueError("nothing to evaluate: name a model, and leave a task or give --texts")
    if settings["texts"] is not None and not settings["texts"].exists():
        raise ValueError(f"--texts {settings['texts']} does not exist")
    from apex_composer.evaluate.evaluation import Evaluation, Settings, find_problems

    console.print("reading the tasks", style="dim")
    path = out / ("eval.json" if settings["limit"] is None else "trial.json")
    evaluation = Evaluation(tasks, Settings(**settings), path, _tell)
    problems = find_problems(evaluation.manager, tasks, evaluation.settings)
    if problems:
        raise ValueError(
            "\n  ".join(("no model was loaded, since these tasks cannot be run:", *problems))
            + "\n--skip leaves tasks out; --list-files says which files are needed, in which form"
        )
    return evaluation, chosen


def _run(
    evaluation: "Evaluation", preset: "Preset", models: Sequence[str], **options: Any
) -> list[str]:
    """Every model in turn, then the tables; lines of what could not be run."""
    from functools import partial

    from apex_composer.data_prep.atomic_files import write_text
    from apex_composer.evaluate import table
    from apex_composer.evaluate.models import open_model

    failed = []
    for model in models:
        try:
            failed += evaluation.evaluate(model, partial(open_model, **options))
        except Exception as error:  # the others are evaluated nevertheless; a GPU may be full
            failed.append(f"{model}: {error}")
    shown = (evaluation.results, preset, evaluation.tasks)
    rows, notes = table.metric_table(*shown), table.notes(*shown)
    console.print(table.as_rich(rows, preset.title))
    console.print("\n".join(notes), markup=False, soft_wrap=True)
    parts = (
        f"# {preset.title}",
        table.as_markdown(rows),
        "\n".join(f"- {line}" for line in notes),
        "## In the paper's layout",
        table.as_markdown(table.paper_table(*shown)),
    )
    page = evaluation.path.with_suffix(".md")
    write_text(page, "\n\n".join(parts) + "\n")
    console.print(f"{evaluation.path}, {page}", soft_wrap=True)
    return failed


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _tell(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
