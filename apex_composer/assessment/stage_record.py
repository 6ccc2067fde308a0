"""What is kept of every stage: plain numbers and lists, for checkpoints, logs and reports."""

from typing import Any

from torch import Tensor

from apex_composer.assessment.scores import GroupTotals
from apex_composer.assessment.selection import Selection


def stage_record(
    stage: int,
    expansion: bool,
    before: dict[str, Selection],
    selections: dict[str, Selection],
    totals: dict[str, GroupTotals],
) -> dict[str, Any]:
    """One stage's selection and the statistics that it came from.

    Args:
        stage: its number, counted from 0.
        expansion: whether the stage trains operators.
        before: the last stage's selections by group, empty for the first stage.
        selections: this stage's, by group.
        totals: the scores behind them, empty with random selection before any training.

    Returns:
        `advantageous`, `disadvantageous`: units by group; `overlap`: Jaccard index of both sets
        with the last stage's; `norm_std`: standard deviation over a group's units of their mean
        activation norm (paper section 2: the sharper, the fewer advantageous parameters).
    """
    return {
        "stage": stage,
        "expansion": expansion,
        "samples": max((t.samples for t in totals.values()), default=0),
        "advantageous": {name: s.advantageous.tolist() for name, s in selections.items()},
        "disadvantageous": {name: s.disadvantageous.tolist() for name, s in selections.items()},
        "overlap": {
            name: [jaccard(a, b) for a, b in zip(before[name], after, strict=True)]
            for name, after in selections.items()
            if name in before
        },
        "norm_std": norm_spread(totals),
    }


def norm_spread(totals: dict[str, GroupTotals]) -> dict[str, float]:
    """Standard deviation over each group's units of their mean activation norm."""
    return {name: float(t.mean_norms().std(correction=0)) for name, t in totals.items()}


def jaccard(first: Tensor, second: Tensor) -> float:
    """Overlap of two sets of units: |A and B| / |A or B|, 1 for equal sets."""
    a, b = set(first.tolist()), set(second.tolist())
    return len(a & b) / len(a | b)
