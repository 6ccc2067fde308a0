"""The operators of a stage: on the model's own weights, or on the copies of their trained rows."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from apex_composer.assessment.selection import Selection
from apex_composer.model.sites import Site
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.sharding.shards import Shard
from apex_composer.trainable.rows import Rows


def make_operators(
    sites: Sequence[Site],
    selections: Mapping[str, Selection],
    rows: Mapping[str, Rows] | None,
    factors: Mapping[str, Sequence[Tensor]],
    seed: int,
    stage: int,
) -> tuple[list[ExpansionOperator], list[list[Shard]] | None]:
    """One operator for each site, fresh or with saved factors.

    Args:
        sites: the model's that are expanded.
        selections: P and N by the group's name.
        rows: the trained ones by the site's name; None where whole weights are trained.
        factors: saved ones by the site's name.
        seed: the run's.
        stage: its number.

    Returns:
        The operators, and what this rank holds of the copies that they act on, see
        `make_executors`.
    """
    operators = []
    for site in sites:
        selection, acted_on = selections[site.group.name], site
        if rows is not None:  # which see the trained units only
            selection, acted_on = rows[site.name].selection(selection), rows[site.name].copies
        own = factors.get(site.name)
        operators.append(ExpansionOperator(acted_on, selection, own, seed=seed, stage=stage))
    return operators, None if rows is None else [rows[site.name].shards() for site in sites]
