"""Which units ranks and changes are split by: those that a run has trained with, or by scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apex_composer.assessment.selection import Selection, count_by_group, select_groups
from apex_composer.model.sites import Site
from apex_composer.tools.saved_model import read_history


class Selected(NamedTuple):
    """Units by group, and where they come from.

    Attributes:
        units: by group; groups that are missing (KV heads, say) are not expanded. None: none known.
        told: what stands in the results: `by` (`checkpoint`, with its `stage`, or `scores`); empty.
    """

    units: dict[str, Selection] | None
    told: dict[str, Any]


def find_selections(
    source: str,
    sites: Sequence[Site],
    activations: Mapping[str, Any] | None,
    threshold: float,
) -> Selected:
    """The units that a checkpoint's run had selected, else those that the scores lead to.

    Args:
        source: what `open_model` takes.
        sites: those of the model.
        activations: that part of the results, if any.
        threshold: share of the units on each side, for a selection by scores.
    """
    recorded = recorded_selections(Path(source), sites)
    if recorded is not None:
        return recorded
    if activations is None:
        return Selected(None, {})
    scores = {name: one["score"] for name, one in activations["groups"].items()}
    return Selected(select_by_scores(sites, scores, threshold=threshold), {"by": "scores"})


def recorded_selections(path: Path, sites: Sequence[Site]) -> Selected | None:
    """The units of the last stage that had trained before a checkpoint was saved.

    A checkpoint at the end of a stage already has the selection of the next one, by which nothing
    has been trained: it is passed over.

    Args:
        path: of a model.
        sites: those of the model, whose groups' names lack Composer's (and peft's) prefixes.

    Returns:
        None where it is no checkpoint, or one of a run without APEX.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or is of another model.
    """
    if not (path.is_file() or (path / ".metadata").is_file()):
        return None
    batch, history = read_history(path)
    trained = [record for record in history if record.get("start_batch", 0) < batch]
    if not trained:
        return None
    record = trained[-1]
    names = {site.group.name for site in sites}
    units = {
        name: Selection(*(torch.tensor(record[side][own]) for side in Selection._fields))
        for own in record["advantageous"]
        for name in names
        if own == name or own.endswith(f".{name}")
    }
    if not units:
        raise ValueError(
            f"{path}: the groups of its stage {record['stage']} "
            f"({', '.join(list(record['advantageous'])[:2])} ...) are none of this model's"
        )
    return Selected(units, {"by": "checkpoint", "stage": record["stage"]})


def select_by_scores(
    sites: Sequence[Site],
    scores: Mapping[str, Sequence[float]],
    *,
    threshold: float = 0.125,
    kv_heads: str = "auto",
) -> dict[str, Selection]:
    """The units that APEX would select by scores, as the Expander does it.

    Args:
        sites: those of `find_sites(model)`.
        scores: of every unit by group, heads and channels.
        threshold: share of the units on each side. Default: the Expander's.
        kv_heads: `auto`, `expand` or `skip`. Default: the Expander's.
    """
    counts = count_by_group(sites, threshold, kv_heads)
    groups = {site.group.name: site.group for site in sites if site.group.name in counts}
    values = {name: torch.as_tensor(own) for name, own in scores.items()}
    return select_groups(list(groups.values()), counts, values, seed=0, stage=0)
