"""Command line: `python -m apex_composer.compare`, or `apex-composer compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from apex_composer.compare.base import prepare_inputs
from apex_composer.compare.configuration import (
    DEFAULT_YAML,
    FOLDER,
    Run,
    best_of,
    build_runs,
    choose_methods,
)
from apex_composer.compare.plot import plot_rows
from apex_composer.compare.runs import finished_result, processes, run_all
from apex_composer.compare.table import REFERENCE, as_csv, as_markdown, make_rows
from apex_composer.data_prep.atomic_files import write_json, write_text
from apex_composer.demo.__main__ import REPORT, choose_precision
from apex_composer.demo.configuration import load_template
from apex_composer.extras import MissingExtraError, require
from apex_composer.report.command import report_job

app = typer.Typer(add_completion=False)
console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the YAML, as key=value.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder <data>/<domain>/**.jsonl[.zst|.gz]; default: Python's library."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of `demo`, whose base model is used; results in compare/.")
    ] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every method.")] = 1,
    only: Annotated[str, typer.Option(help="Methods to run, as a,b; default: all.")] = "",
    yaml: Annotated[Path, typer.Option(help="The job's settings.")] = DEFAULT_YAML,
) -> None:
    """Fine-tune one base model by every method on the same batches, and put all in one table.

    Exit status: 0 done, 1 a run or the data is at fault, 2 an extra is missing.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    try:
        require("apex-composer compare", "foundry")
        require("apex-composer compare", "prep")
        errors = run_job(data, out, yaml, overrides or [], seeds, names)
    except (OSError, ValueError, RuntimeError, MissingExtraError) as error:
        console.print(f"error: {error}", style="red")
        raise typer.Exit(2 if isinstance(error, MissingExtraError) else 1) from error
    for run, error in errors.items():
        console.print(f"error: {run} failed with {error}", style="red")
    if errors:
        raise typer.Exit(1)


def run_job(
    data: Path | None, out: Path, yaml: Path, overrides: list[str], seeds: int, only: list[str]
) -> dict[str, str]:
    """Prepare, train what is not trained yet, and write table and plot of all that is.

    Args:
        data: RedPajama-format folder, or None for what every machine has.
        out: folder of `make train`.
        overrides: `key=value` changes to the YAML.
        seeds: runs of every method.
        only: names of methods; empty for all.

    Returns:
        What went wrong, by the name of the run.

    Raises:
        OSError, ValueError: a setting or the data is unusable.
        RuntimeError: the base model's run failed.
    """
    template = load_template(yaml, out, overrides)
    methods = choose_methods(template, only)  # a misspelt one is told before anything begins
    length, demo = template.shared.max_seq_len, list(template.variables.demo)
    inputs = prepare_inputs(data, out, demo, length)
    given = seeds, choose_precision(), inputs
    console.print(describe(inputs["instructions"], len(methods), seeds))
    with processes() as start:
        errors = run_all(build_runs(template, methods, *given), start)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in template.methods}
    for run in build_runs(template, choose_methods(template), *given):
        results[run.method].append(finished_result(run))
    write_results(out / FOLDER, template, results, inputs)
    every = build_runs(template, choose_methods(template), *given)
    report_runs(out / FOLDER, [run for run in every if finished_result(run)])
    return errors


def describe(instructions: dict[str, Any], methods: int, seeds: int) -> str:
    """Say what is trained on."""
    train, held_out = instructions["train"], instructions["held_out"]
    return (
        f"{instructions['kind']}: {train['examples']:,} examples to train on "
        f"({train['tokens']:,} tokens, {train['response_tokens']:,} of answers), "
        f"{held_out['examples']:,} held out ({held_out['response_tokens']:,} of answers); "
        f"{methods} methods, {seeds} seeds"
    )


def write_results(
    folder: Path, template: Any, results: dict[str, list[dict[str, Any] | None]], inputs: Any
) -> None:
    """Write the table of all methods that have a result for every seed, and say which have not."""
    whole = {method: own if all(own) else [] for method, own in results.items()}
    groups = {method: best_of(template, method) for method in template.methods}
    rows = make_rows(whole, {method: others for method, others in groups.items() if others})
    missing = [method for method in results if method not in {row.method for row in rows}]
    text = as_markdown(rows)
    if missing:
        text += f"\nWithout a result for every seed: {', '.join(missing)}.\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", as_csv(rows))
    write_json(folder / "inputs.json", inputs)
    console.print(text)
    if rows:
        plot_rows(folder / "perplexity.png", rows)
    for name in ("table.md", "table.csv", "perplexity.png"):
        console.print(f"{folder / name}")


def report_runs(folder: Path, runs: list[Run]) -> None:
    """Write the page of all runs that have a result, and say where it is or why it is not."""
    if runs:
        methods = {run.method for run in runs}
        baselines = [REFERENCE] if REFERENCE in methods and len(methods) > 1 else []
        console.print(report_job([run.folder for run in runs], folder / REPORT, baselines))


if __name__ == "__main__":
    app()
