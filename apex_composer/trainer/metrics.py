"""What is logged under `apex/`: flat names and numbers."""

from statistics import fmean
from typing import Any

from apex_composer.assessment.stage_record import norm_spread
from apex_composer.expander import Expander
from apex_composer.model.sites import projection_of

_SIDES = ("advantageous", "disadvantageous")


def stage_metrics(expander: Expander) -> dict[str, Any]:
    """Metrics of a stage's start: its number, the selection's overlap, the norms' spread.

    Returns:
        `apex/stage`; `apex/overlap/<side>/<unit>`: mean Jaccard index with the last stage's
        selection; `apex/norm_std/<group>` and, as its mean, `apex/norm_std_mean/<unit>`; where rows
        are trained, `apex/trained_parameters` and `apex/trained_share` of all parameters.
    """
    record = expander.history[-1]
    units = {group.name: group.unit for group in expander.groups}
    metrics: dict[str, Any] = {"apex/stage": record["stage"]}
    if expander.share is not None:
        trained, total = expander.share.trained, expander.share.total
        metrics |= {"apex/trained_parameters": trained, "apex/trained_share": trained / total}
    for place, side in enumerate(_SIDES):
        overlaps = {name: pair[place] for name, pair in record["overlap"].items()}
        metrics |= _means(f"apex/overlap/{side}", overlaps, units)
    return metrics | _norm_metrics(record["norm_std"], units)


def final_metrics(expander: Expander) -> dict[str, Any]:
    """Metrics of the end of the last stage, whose scores select nothing any more (collective)."""
    units = {group.name: group.unit for group in expander.groups}
    spread = norm_spread(expander.assessment.totals())
    return step_metrics(expander, timed=False) | _norm_metrics(spread, units)


def _norm_metrics(spread: dict[str, float], units: dict[str, str]) -> dict[str, float]:
    metrics = {f"apex/norm_std/{name}": value for name, value in spread.items()}
    return metrics | _means("apex/norm_std_mean", spread, units)


def step_metrics(expander: Expander, *, timed: bool = True) -> dict[str, Any]:
    """Metrics of one step (waits for the device).

    Returns:
        `apex/operator_norm/<projection>`: mean of |T W[P]| / |W_eff[N]| over the layers;
        `apex/milliseconds_per_step`: time spent on APEX in this step.
    """
    norms = expander.relative_norms()
    projections = {name: projection_of(name) for name in norms}
    metrics: dict[str, Any] = {"apex/stage": expander.stage}
    metrics |= _means("apex/operator_norm", norms, projections)
    if timed:
        metrics["apex/milliseconds_per_step"] = expander.stopwatch.read()
    return metrics


def _means(prefix: str, values: dict[str, float], kinds: dict[str, str]) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for name, value in values.items():
        by_kind.setdefault(kinds.get(name, "other"), []).append(value)
    return {f"{prefix}/{kind}": fmean(found) for kind, found in by_kind.items()}
