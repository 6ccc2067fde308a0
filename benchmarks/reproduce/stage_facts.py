"""What is worth knowing of a stage beside its loss: its units as it begins, its T as it ends."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from reproduce.model import token_losses
from torch import Tensor, nn

from apex_composer import Expander, find_sites
from apex_composer.assessment.collector import Assessment
from apex_composer.assessment.scores import GroupTotals
from apex_composer.assessment.selection import Selection
from apex_composer.model.sites import Group
from apex_composer.observe.masking import WHICH, choose_all_masked, count_masked, masked
from apex_composer.observe.ranks import entropy_rank
from apex_composer.ops.monarch import to_dense

MASKED_SHARE = 0.1  # paper, table 4


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Of equal batches, in nats."""
    return _mean([float(token_losses(model, batch).double().mean()) for batch in batches])


def assess_units(
    model: nn.Module, batches: Sequence[Tensor]
) -> tuple[list[Group], dict[str, GroupTotals], float]:
    """The heads and channels of a model, what their norms are on some batches, and its loss there.

    Args:
        model: any that `find_sites` knows.
        batches: [windows, length + 1] each.
    """
    groups = {site.group.name: site.group for site in find_sites(model)}
    assessed = [group for group in groups.values() if group.assessed_by is None]
    assessment = Assessment([(group, 1) for group in assessed])
    try:
        with assessment.assessing():
            whole = mean_loss(model, batches)
        return assessed, assessment.totals(), whole
    finally:
        assessment.remove()


def masked_losses(model: nn.Module, batches: Sequence[Tensor], seed: int) -> dict[str, float]:
    """The loss with all units, and without a tenth of every group (paper, table 4).

    Args:
        model: any that `find_sites` knows.
        batches: [windows, length + 1] each; norms are of the same.
        seed: of the random tenth.

    Returns:
        `whole`, `lowest`, `top`, `random`: losses in nats; `heads`, `channels`: how many are
        masked in the whole model.
    """
    assessed, totals, whole = assess_units(model, batches)
    found = {"whole": whole}
    for which in WHICH:
        hidden = choose_all_masked(assessed, totals, which, MASKED_SHARE, seed=seed)
        with masked(assessed, hidden):
            found[which] = mean_loss(model, batches)
    return found | count_masked(assessed, hidden)


def norm_facts(totals: Mapping[str, GroupTotals]) -> dict[str, Any]:
    """`norms`: by kind of unit, mean over layers of the units' mean norms and their deviation."""
    kinds = defaultdict(list)
    for name, total in totals.items():
        kinds[_kind(name)].append(total.mean_norms())
    return {
        "norms": {
            kind: {
                "mean": _mean([float(norms.mean()) for norms in layers]),
                "std": _mean([float(norms.std(correction=0)) for norms in layers]),
            }
            for kind, layers in kinds.items()
        }
    }


def overlap_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """`overlap`: by kind of unit, Jaccard index of P and of N with the stage's before, over layers.

    Args:
        record: of the stage, from the expander's history; a first one has no overlap.
    """
    kinds = defaultdict(list)
    for name, pair in record["overlap"].items():
        kinds[_kind(name)].append(pair)
    means = {
        kind: dict(zip(Selection._fields, map(_mean, zip(*own, strict=True)), strict=True))
        for kind, own in kinds.items()
    }
    return {"overlap": means} if means else {}


def count_facts(selections: Mapping[str, Selection]) -> dict[str, Any]:
    """`selected`: by kind of unit, K of a layer: shares of few units round to the same number."""
    return {"selected": {_kind(name): len(own.advantageous) for name, own in selections.items()}}


def operator_facts(expander: Expander) -> dict[str, Any]:
    """Of a stage's operators, as a mean and by kind of site; nothing without operators.

    Returns:
        `relative_norm`: |T W[P]| / |W_eff[N]|; `effective_rank`: exp of the entropy of T's
        normalised singular values (Roy and Vetterli 2007), at most n; `operators`: both by kind.
    """
    norms = expander.relative_norms()
    if not norms:
        return {}
    kinds = defaultdict(list)
    for operator in expander.operators:
        values = torch.linalg.svdvals(to_dense(operator.factors).float())
        pair = norms[operator.site.name], entropy_rank(values)
        kinds[operator.site.name.split(".")[-2]].append(pair)
    return kind_facts(kinds)


def kind_facts(kinds: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Means of relative norms and effective ranks, over all sites and by kind of site."""
    names = "relative_norm", "effective_rank"

    def means(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
        return dict(zip(names, map(_mean, zip(*pairs, strict=True)), strict=True))

    return means(sum(kinds.values(), [])) | {
        "operators": {kind: means(pairs) for kind, pairs in kinds.items()}
    }


def _kind(group: str) -> str:
    return group.rsplit(".", 1)[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
