"""From folders to runs: what `local_metrics` wrote, or what older jobs have left."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apex_composer.callbacks.metrics_file import NAME
from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.paths import MANIFEST
from apex_composer.report.read_campaign import read_campaign, split_path
from apex_composer.report.read_metrics import read_metrics
from apex_composer.report.read_old_jobs import (
    METRICS,
    RESULT,
    read_compare_run,
    read_config,
    read_demo_run,
)
from apex_composer.report.run import Run

# Where `local_metrics` writes below a run's folder.
PLACES = (Path("metrics") / NAME, Path("checkpoints") / "metrics" / NAME, Path(NAME))
# What `apex-composer observe` writes: of one model, and of several in a folder for each.
OBSERVATIONS = ("observe*.json", "*/observe.json", "observe*/*/observe.json")
# Folders of a job that hold other things than its runs; `make compare` is a job of its own.
NOT_RUNS = ("compare", "data", "corpus", "model", "hf", "huggingface", "cache", "checkpoints")
DEPTH = 3  # runs/demo/compare -> runs -> <method> -> seed<k>


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run at or below the given paths.

    Args:
        paths: a run's folder (`runs/tinyllama-apex`), the folder of its metrics or the file; what
            `make train` or `make compare` wrote; any folder of runs; or a campaign's file of
            results, with or without a part of them: `results.jsonl/<base>/<study>/<arm>`.

    Raises:
        FileNotFoundError: a path does not exist, or holds no run; the message says what is looked
            for.
        ValueError: a file is damaged or of something else; the message names it.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        campaign = split_path(path)
        if campaign is not None:
            for run in read_campaign(*campaign):
                runs.setdefault(run.folder.resolve(), run)
            continue
        own = list(find_runs(_run_folder(path)))
        if not own:
            raise FileNotFoundError(
                f"{path} holds no run: neither {NAME} (loggers: {{local_metrics: {{}}}} in the "
                f"YAML) nor {METRICS} or {RESULT} of make train or make compare. Give the folder "
                "of a run, or a campaign's .jsonl."
            )
        for folder in own:
            if folder.resolve() not in runs:  # which may be given twice, by other paths
                runs[folder.resolve()] = read_run(folder)
    return name_apart(list(runs.values()))


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders of runs at or below a folder."""
    if any((folder / place).is_file() for place in (*PLACES, METRICS, RESULT)):
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name not in NOT_RUNS and not child.name.startswith("."):
                yield from find_runs(child, depth - 1)


def _run_folder(path: Path) -> Path:
    """The run's folder for its file or the folder of its metrics."""
    folder = path.parent if path.is_file() else path
    for place in PLACES[:2]:
        parts = place.parent.parts
        if folder.parts[-len(parts) :] == parts and (folder / NAME).is_file():
            run = folder.parents[len(parts) - 1]
            if parts[0] == "checkpoints" or run.name != "checkpoints":
                return run
    return folder


def read_run(folder: Path) -> Run:
    """Read the run of one folder, with the observations in it.

    Raises:
        ValueError: a file is damaged or of something else; the message names it.
    """
    run = _read(folder)
    if not run.data:
        data = read_manifest(run)
        lacks = [] if data else [f"data: no {MANIFEST} beside the training data on this machine"]
        run = replace(run, data=data, missing=[*run.missing, *lacks])
    observations = read_observations(folder)
    lacks = [
        f"{name}: the observation was interrupted. Give its command again: it goes on"
        for name, one in observations.items()
        if one.get("unfinished")
    ]
    finished = {name: one for name, one in observations.items() if not one.get("unfinished")}
    return replace(run, observations=finished, missing=[*run.missing, *lacks])


def read_observations(folder: Path) -> dict[str, Any]:
    """Observations in a run's folder by their places in it, in the order that observe was given."""
    paths = sorted({path for pattern in OBSERVATIONS for path in folder.glob(pattern)})
    found = {path.relative_to(folder): read_json(path) for path in paths}
    order = sorted(found, key=lambda path: found[path].get("place", 0))
    return {str(path.parent if len(path.parts) > 1 else path): found[path] for path in order}


def _read(folder: Path) -> Run:
    place = next((p for p in (*PLACES, METRICS, RESULT) if (folder / p).is_file()), Path(RESULT))
    try:
        if place in PLACES:
            run = read_metrics(folder / place, folder)
            return run if run.settings else _with_config(run, folder)
        return read_demo_run(folder) if place == METRICS else read_compare_run(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{folder / place} is damaged, or of something else: {error!r}. Remove it, or leave "
            "this folder out."
        ) from error


def read_manifest(run: Run) -> dict[str, Any]:
    """Where the manifest of the training data is, its sha256 and its splits; empty without one."""
    kept = run.settings.items()
    loader = [(key, value) for key, value in kept if key.startswith("train_loader.")]
    places = [Path(str(v)) for k, v in loader if k.rsplit(".", 1)[-1] in ("local", "hf_name")]
    for place in places:
        for folder in (place, *place.parents[:2]):  # <data>/<split>/<domain>
            path = folder / MANIFEST
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                splits = read_json(path).get("splits", {})
                return {"manifest": str(path), "sha256": digest, "splits": splits}
    return {}


def _with_config(run: Run, folder: Path) -> Run:
    settings = read_config(folder)
    if not settings:
        return run
    missing = [line for line in run.missing if not line.startswith("settings:")]
    return replace(run, settings=settings, missing=missing)


def name_apart(runs: Sequence[Run]) -> list[Run]:
    """Give runs of one name the last parts of their folders instead, as many as they need."""
    names = [run.name for run in runs]
    return [
        replace(run, name=_short(run, runs)) if names.count(run.name) > 1 else run for run in runs
    ]


def _short(run: Run, runs: Sequence[Run]) -> str:
    others = [o.folder.resolve() for o in runs if o.name == run.name and o.folder != run.folder]
    parts = run.folder.resolve().parts
    for count in range(1, len(parts)):
        if all(other.parts[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-max(count, 2) :])
    return str(run.folder)
