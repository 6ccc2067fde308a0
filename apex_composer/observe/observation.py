"""One model's observation: its parts in turn, each kept as soon as it is there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apex_composer.assessment.scores import GroupTotals
from apex_composer.callbacks.run_facts import versions
from apex_composer.evaluate.identity import check_positions, model_sha256
from apex_composer.evaluate.models import OpenedModel, open_model
from apex_composer.evaluate.texts import Texts
from apex_composer.model.find_sites import find_sites
from apex_composer.model.sites import Site
from apex_composer.observe.activations import (
    assessed_groups,
    collect_totals,
    describe_activations,
)
from apex_composer.observe.changes import measure_changes, open_weights
from apex_composer.observe.masking import (
    WHICH,
    choose_all_masked,
    count_masked,
    describe_masking,
    measure_masked,
)
from apex_composer.observe.predictions import Domains, predict
from apex_composer.observe.ranks import measure_ranks
from apex_composer.observe.results import (
    keep_pieces,
    open_results,
    save_results,
    write_tables,
)
from apex_composer.observe.selections import find_selections
from apex_composer.observe.settings import Settings, read_before_loading, read_samples

# What the numbers come from.
_PACKAGES = ("apex-composer", "torch", "transformers")
_WEIGHTS = (".safetensors", ".distcp")


def observe_model(
    source: str, folder: Path, settings: Settings, *, place: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Observe a model, or go on with what an earlier run has begun; the model is left as it was.

    Args:
        source: what `open_model` takes.
        folder: of the results.
        settings: checked ones.
        place: of the model among those that are observed together, from 1. Default: 1.
        overwrite: whether results of something else are replaced.

    Returns:
        The content of `observe.json`.
    """
    texts = read_before_loading(source, settings)
    with open_model(source, device=settings.device, dtype=settings.dtype) as opened:
        if settings.data is not None:
            check_positions(opened.model.config, settings.sequence_length)
        if texts is None and settings.data is not None:
            texts = read_samples(settings, opened.tokenizer)
        sites = find_sites(opened.model, settings.wanted_targets)
        results = open_results(folder, _identity(opened, texts, settings), overwrite=overwrite)
        results |= {"place": place, "unfinished": True}
        save_results(folder, results)
        with _told_what_fits(settings.batch_size):
            if texts is not None:
                _observe_samples(opened, sites, texts.domains, folder, results, settings)
            _observe_weights(opened, sites, folder, results, settings)
    del results["unfinished"]
    save_results(folder, results)
    write_tables(folder, results)
    return results


def _identity(opened: OpenedModel, texts: Texts | None, settings: Settings) -> dict[str, Any]:
    data = None
    if texts is not None:
        data = {
            "path": str(settings.data),
            "sha256": texts.sha256,
            "samples": {name: len(own) for name, own in texts.domains.items()},
            "protocol": settings.protocol,
        }
    return {
        "model": opened.name,
        "model_sha256": model_sha256(opened.model),
        "versions": versions(_PACKAGES),
        "settings": {
            "threshold": settings.threshold,
            "targets": sorted(settings.targets),
            "mask_by": settings.mask_by,
            "seed": settings.seed,
        },
        "data": data,
    }


@contextmanager
def _told_what_fits(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--batch-size {batch_size} does not fit into the GPU's memory: give a smaller one, or "
            "a shorter --sequence-length. What is finished is kept"
        ) from error


def _observe_samples(
    opened: OpenedModel,
    sites: list[Site],
    domains: Domains,
    folder: Path,
    results: dict[str, Any],
    settings: Settings,
) -> None:
    """The parts that need forward passes: activations, and a row for each mask."""
    groups = assessed_groups(sites, settings.threshold)
    if "activations" not in results:
        samples = [sample for own in domains.values() for sample in own]
        totals = collect_totals(opened.model, groups, samples, batch_size=settings.batch_size)
        results["activations"] = describe_activations(groups, totals, settings.protocol)
        save_results(folder, results)
    if settings.mask:
        _observe_masks(opened, groups, domains, folder, results, settings)


def _observe_masks(
    opened: OpenedModel,
    groups: list,
    domains: Domains,
    folder: Path,
    results: dict[str, Any],
    settings: Settings,
) -> None:
    """Rows of the table, those that are missing; first of all the model without a mask."""
    units, totals = [group for group, _ in groups], _read_totals(results["activations"])
    rows = results.setdefault("masking", [])
    finished = {(row["which"], row["share"]) for row in rows}
    left = [
        (which, share)
        for share in settings.mask
        for which in WHICH
        if (which, share) not in finished
    ]
    if not left:
        return
    # All sets before the first pass: a share that masks nothing is told at once.
    choices = {"mask_by": settings.mask_by, "seed": settings.seed}
    hidden = {(w, s): choose_all_masked(units, totals, w, s, **choices) for w, s in left}
    options = {"batch_size": settings.batch_size}
    whole = predict(opened.model, domains, title="without a mask", **options)
    if not rows:
        nothing = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in units}
        rows.append(_row("none", 0.0, count_masked(units, nothing), describe_masking(whole, whole)))
        save_results(folder, results)
    for (which, share), chosen in hidden.items():
        found = measure_masked(
            opened.model, domains, units, chosen, title=f"{which} {share:g}", **options
        )
        numbers = describe_masking(found, whole)
        rows.append(_row(which, share, count_masked(units, chosen), numbers))
        save_results(folder, results)


def _row(which: str, share: float, counts: Mapping[str, int], numbers: dict) -> dict[str, Any]:
    return {"which": which, "share": share, **counts, **numbers}


def _read_totals(activations: Mapping[str, Any]) -> dict[str, GroupTotals]:
    """What was collected, from the results: sums are means times samples."""
    samples = activations["samples"]
    return {
        name: GroupTotals(
            torch.tensor(one["score"]),
            torch.tensor(one["mean_norm"], dtype=torch.float64) * samples,
            samples,
        )
        for name, one in activations["groups"].items()
    }


def _observe_weights(
    opened: OpenedModel,
    sites: list[Site],
    folder: Path,
    results: dict[str, Any],
    settings: Settings,
) -> None:
    """The parts that look at weights alone, with the selection that the scores lead to."""
    selected = find_selections(opened.name, sites, results.get("activations"), settings.threshold)
    options = {"device": settings.device}
    if settings.ranks:
        # Measured without a selection they lack what the paper's assumptions are about.
        into = _begin(results, "ranks", {"selected": selected.told})
        pieces = measure_ranks(sites, selected.units, done=into.keys(), **options)
        keep_pieces(folder, results, into, pieces)
    if settings.delta is not None:
        key = {"base": str(settings.delta), "base_files": _files(settings.delta)}
        into = _begin(results, "delta", {**key, "selected": selected.told})
        base = open_weights(settings.delta)
        pieces = measure_changes(
            opened.model, sites, base, selected.units, done=into.keys(), **options
        )
        keep_pieces(folder, results, into, pieces)


def _begin(results: dict[str, Any], part: str, key: dict[str, Any]) -> dict[str, Any]:
    """The weights of a part that are finished; none where it is of something else."""
    found = results.get(part, {})
    if {name: found.get(name) for name in key} != key:
        results[part] = {**key, "weights": {}}
    return results[part]["weights"]


def _files(source: Path) -> list[list[Any]]:
    """Name, size and time of a base's weights: whether it is the one of the earlier run."""
    files = [source]
    if source.is_dir():  # results may be written into it
        files = sorted(path for path in source.iterdir() if path.suffix in _WEIGHTS)
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
