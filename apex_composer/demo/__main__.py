"""Command line: `python -m apex_composer.demo`, or `apex-composer demo`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from apex_composer.data_prep.atomic_files import read_json, write_json, write_text
from apex_composer.demo.configuration import DEFAULT_YAML, build_configurations, load_template
from apex_composer.demo.embedded import write_embedded_corpus
from apex_composer.demo.from_scratch import TOKENIZER, Prepared, prepare_from_scratch
from apex_composer.demo.model import write_model_folder
from apex_composer.demo.plot import plot_losses
from apex_composer.demo.results import summarise
from apex_composer.demo.run import METRICS
from apex_composer.demo.steps import describe_steps, expected_minutes, show_minutes
from apex_composer.demo.table import make_table
from apex_composer.extras import MissingExtraError, require
from apex_composer.report.command import report_job

# More threads slow so small a model down.
MOST_THREADS = 8
REPORT = "report.html"
RESULTS = ("summary.json", "loss.png", REPORT, "hf")

app = typer.Typer(add_completion=False)
console = Console()


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the YAML, as key=value.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder <data>/<domain>/**.jsonl[.zst|.gz]; default: embedded text."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    yaml: Annotated[Path, typer.Option(help="The job's settings.")] = DEFAULT_YAML,
) -> None:
    """Train a small base model, then continue it twice on the same batches: vanilla and APEX."""
    try:
        require("apex-composer demo", "foundry")
        require("apex-composer demo", "prep")
        summary = run_job(data, out, yaml, overrides or [])
    except (OSError, ValueError, RuntimeError, MissingExtraError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, MissingExtraError) else 1) from error
    console.print(make_table(summary))
    console.print(f"{out}/summary.json  all numbers, selections, versions", soft_wrap=True)
    console.print(f"{out}/hf/           the APEX model, ready for from_pretrained", soft_wrap=True)
    console.print(f"{out}/loss.png      both loss curves", soft_wrap=True)
    told = report_job([out / "vanilla", out / "apex"], out / REPORT, baselines=["vanilla"])
    console.print(told, markup=False, soft_wrap=True)
    console.print(f"{out}/<run>/        configuration and metrics of each run", soft_wrap=True)


def run_job(data: Path | None, out: Path, yaml: Path, overrides: list[str]) -> dict[str, Any]:
    """Prepare data, train the three models and write the results.

    Args:
        data: RedPajama-format folder, or None for the embedded corpus.
        overrides: `key=value` changes to them.

    Returns:
        The content of `summary.json`.

    Raises:
        OSError, ValueError: a setting or the data is unusable.
        RuntimeError: a run failed.
    """
    template = load_template(yaml, out, overrides)
    minutes = expected_minutes(template)
    console.print(describe_steps(minutes), soft_wrap=True, highlight=False)
    console.rule(f"data: {show_minutes(minutes['data'])}")
    prepared = prepare_data(data, out, template)
    vocabulary = prepared.tokenizer["vocabulary_size"]
    if vocabulary < template.variables.vocabulary_size:
        console.print(f"vocabulary: {vocabulary} tokens, the text yields no more")
    sequence_length = template.shared.max_seq_len
    tokenizer = out / "data" / TOKENIZER
    write_model_folder(out / "model", tokenizer, dict(template.variables.model), sequence_length)
    for name in RESULTS:  # an earlier job's results must not pass for this one's
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    configurations = build_configurations(
        template, prepared.splits, out / "data", choose_precision(), sys.stderr.isatty()
    )
    metrics = {}
    for name, settings in configurations.items():
        console.rule(f"{name}: {settings['max_duration']}, {show_minutes(minutes[name])}")
        metrics[name] = start_run(name, out, settings)
    exported = out / "apex" / "huggingface"
    os.replace(exported / "final", out / "hf")
    exported.rmdir()
    summary = summarise(metrics, prepared, configurations)
    losses = {name: metrics[name]["loss"] for name in ("vanilla", "apex")}
    plot_losses(out / "loss.png", losses, summary)
    write_json(out / "summary.json", summary)
    return summary


def prepare_data(data: Path | None, out: Path, template: Any) -> Prepared:
    """Write `<out>/data`, unless it already holds the same.

    Args:
        data: RedPajama-format folder, or None for the embedded corpus in `<out>/corpus`.
    """
    source = data or out / "corpus"
    if data is None and not source.exists():
        write_embedded_corpus(source)
    return prepare_from_scratch(
        source,
        out / "data",
        vocabulary_size=template.variables.vocabulary_size,
        sequence_length=template.shared.max_seq_len,
        text_limit=template.variables.text_limit,
    )


def start_run(name: str, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one model in a process of its own.

    A run is then what a user would start, its step times owe nothing to the runs before it, and
    nothing of them (random states, shared memory, hooks) can reach it. Starting costs some seconds.

    Args:
        settings: the complete llm-foundry configuration.

    Returns:
        The run's metrics.

    Raises:
        RuntimeError: the run failed.
    """
    from omegaconf import OmegaConf

    config = out / name / "config.yaml"
    write_text(config, OmegaConf.to_yaml(settings))
    (out / name / METRICS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "apex_composer.demo.run", str(config)]
    status = subprocess.run(command, env=run_environment()).returncode
    if status != 0:
        raise RuntimeError(
            f"The run {name!r} failed with status {status}; its own error is above. "
            f"Its configuration is {config}."
        )
    return read_json(out / name / METRICS)


def run_environment() -> dict[str, str]:
    """The environment of a run: no hub, no warnings of other packages, as many threads as cores."""
    import joblib

    threads = min(joblib.cpu_count(only_physical_cores=True), MOST_THREADS)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return defaults | os.environ


def choose_precision() -> str:
    """Name the precision of this machine: bf16 arithmetic on a GPU that has it, else fp32."""
    import torch

    return "amp_bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


if __name__ == "__main__":
    app()
