"""Runs of `make train` and `make compare` from before they kept what `local_metrics` writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.report.read_metrics import flatten
from apex_composer.report.read_stages import make_stage
from apex_composer.report.run import Curve, Run
from apex_composer.trainer.config_transform import normalise_algorithms

METRICS, RESULT, CONFIG = "metrics.json", "result.json", "config.yaml"
SUMMARY, INPUTS = "summary.json", "inputs.json"
HELD_OUT = "held_out"
_AGAIN = "run it again: newer versions keep it"


def read_config(folder: Path) -> dict[str, Any]:
    """A run's `config.yaml`, flat; empty where there is none.

    Raises:
        ValueError: it is no YAML of a run.
    """
    import yaml

    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it or put it back.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no configuration of a run: it holds no keys")
    return flatten(normalise_algorithms(content))


def read_demo_run(folder: Path) -> Run:
    """Read `metrics.json`, and of the job's `summary.json` the versions and validation tokens.

    Raises:
        ValueError: `metrics.json` is damaged, or not of `make train`.
    """
    found = _read(folder / METRICS, ("loss", "step_seconds", "cross_entropy", "stages", "device"))
    summary = read_json(folder.parent / SUMMARY) or {}
    data = summary.get("data", {})
    norms = found.get("operator_norms", {})
    run = _old_run(folder, found, found["loss"], found["cross_entropy"])
    missing = [*run["missing"]]
    if not summary:
        missing.append(f"versions, validation tokens: {folder.parent / SUMMARY} is not there")
    if found["stages"]:
        missing.append(f"scores of the stages: {_AGAIN}")
    per_batch = _tokens_per_batch(run["settings"])
    curves = {f"apex/operator_norm/{name}": _norms(own, per_batch) for name, own in norms.items()}
    return Run(
        **{**run, "missing": missing},
        versions=summary.get("versions", {}),
        data=data,
        validation_tokens=data.get("predicted_validation_tokens", {}),
        stages=[make_stage(record, None) for record in found["stages"]],
        metrics=curves,
    )


def read_compare_run(folder: Path) -> Run:
    """Read `result.json`, and of the job's `inputs.json` the versions.

    Raises:
        ValueError: `result.json` is damaged, or not of `make compare`.
    """
    found = _read(folder / RESULT, ("training_loss", "step_seconds", "held_out_loss", "device"))
    inputs = read_json(folder.parents[2] / INPUTS) or {}
    run = _old_run(folder, found, found["training_loss"], {HELD_OUT: found["held_out_loss"]})
    missing = [*run["missing"], f"stages and their scores: {_AGAIN}"]
    instructions = inputs.get("instructions", {})
    return Run(
        **{**run, "missing": missing},
        versions=inputs.get("versions", {}),
        data=instructions,
        validation_tokens={},
    )


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    found = read_json(path)
    lacking = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacking:
        raise ValueError(f"{path} is not of a run of this project: it lacks {', '.join(lacking)}")
    return found


def _old_run(
    folder: Path, found: Mapping[str, Any], losses: Sequence[float], validation: Mapping
) -> dict[str, Any]:
    """What both kinds have: one evaluation at the end, the loss and the time of each batch."""
    settings, count = read_config(folder), len(losses)
    missing = [f"validation curve: one evaluation at the end is kept; {_AGAIN}"]
    if not settings:
        missing.append(f"settings: {folder / CONFIG} is not there")
    per_batch = _tokens_per_batch(settings)
    if per_batch is None:
        missing.append(f"training tokens: {_AGAIN}")
    threads = found.get("threads")
    is_cpu = found["device"] == "cpu" and threads
    return {
        "name": str(settings.get("run_name") or folder.name),
        "folder": folder,
        "settings": settings,
        "device": f"cpu, {threads} threads" if is_cpu else found["device"],
        "loss": Curve(range(count), _tokens(range(count), per_batch), losses),
        "validation": {
            domain: Curve([count], _tokens([count], per_batch), [value])
            for domain, value in validation.items()
        },
        "step_seconds": found["step_seconds"],
        "missing": missing,
    }


def _tokens_per_batch(settings: Mapping[str, Any]) -> int | None:
    """Known where every sequence is full: that of the loader `text`."""
    if settings.get("train_loader.name") != "text":
        return None
    return int(settings["global_train_batch_size"]) * int(settings["max_seq_len"])


def _tokens(batches: Sequence[int], per_batch: int | None) -> list[int]:
    return [] if per_batch is None else [batch * per_batch for batch in batches]


def _norms(pairs: Sequence[Sequence[float]], per_batch: int | None) -> Curve:
    batches = [int(batch) for batch, _ in pairs]
    return Curve(batches, _tokens(batches, per_batch), [value for _, value in pairs])
