"""How strongly each head and channel of a model acts: mean norms, rank scores, their deviation.

Paper, section 2 and appendix A.1: "inference performed on 2048 samples with the same fixed random
seed in GSM8K. For each component, we average the activations across samples and compute the
standard deviation of these averaged activations across different heads in each MHA module and
across different channels in each FFN module."

The paper is silent about, and this is our choice:
    - which split of GSM8K (its test split has 1,319 samples, fewer than 2,048), whether a sample is
      the question alone or with its answer, and examples before it: a sample is a document or a
      prompt with its answer, all of its tokens;
    - the seed, and the dtype: 17, and the model's own (sums are made in float32 or wider);
    - how the tokens of a sample come together: eq. 3's Frobenius norm over all of them, which is
      larger for longer samples; padding never counts;
    - n or n - 1 under the deviation's root: n, as in the `apex/norm_std` that training logs;
    - beginning-of-sequence tokens, whose activations are large in many models: they count.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from apex_composer.assessment.collector import Assessment
from apex_composer.assessment.scores import GroupTotals
from apex_composer.assessment.selection import count_by_group
from apex_composer.assessment.stage_record import norm_spread
from apex_composer.data_prep.progress import progress_bar
from apex_composer.evaluate.samples import Sample
from apex_composer.model.sites import Group, Site
from apex_composer.observe.predictions import padded_batches
from apex_composer.observe.ranks import describe_weight

# Appendix A.1.
PAPER_SAMPLES = 2048


def assessed_groups(sites: Sequence[Site], threshold: float) -> list[tuple[Group, int]]:
    """Query heads and channels, with their K: how many a sample ranks as largest and as smallest.

    KV heads have no activation of their own: training gives them the sum of their query heads'.

    Args:
        sites: those of `find_sites(model)`.
        threshold: share of the units on each side, as in training.

    Raises:
        ValueError: where it selects none.
    """
    counts = count_by_group(sites, threshold, "skip")
    groups = {site.group.name: site.group for site in sites}
    return [(groups[name], count) for name, count in counts.items()]


@torch.inference_mode()
def collect_totals(
    model: nn.Module,
    groups: Sequence[tuple[Group, int]],
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
) -> dict[str, GroupTotals]:
    """Scores and sums of norms of every unit over the samples; the model is left as it was.

    The order of the samples and the batch size change the sums by rounding alone; a rank can change
    only where the norms of two units of a sample are that close.

    Args:
        model: a causal language model in evaluation mode, on the device that it is to run on.
        groups: those of `assessed_groups`.
        samples: of any lengths.
        batch_size: samples of a forward pass.
    """
    assessment = Assessment(groups)
    total = sum(len(sample.tokens) for sample in samples)
    body = getattr(model, "base_model", model)  # the logits are not looked at
    try:
        with progress_bar(desc="activations", total=total, unit="tok") as bar:
            device = next(model.parameters()).device
            for _, batch in padded_batches(samples, batch_size, device):
                del batch["labels"]
                with assessment.assessing(batch["attention_mask"]):
                    body(**batch, use_cache=False)
                bar.update(int(batch["attention_mask"].sum()))
    finally:
        assessment.remove()
    return assessment.totals()


def describe_activations(
    groups: Sequence[tuple[Group, int]], totals: dict[str, GroupTotals], protocol: str
) -> dict[str, Any]:
    """The numbers of `collect_totals` for a result file.

    Returns:
        `protocol`, `samples`, and by group's name `unit` (head or channel), `layer`, `mean_norm`
        and `score` of each unit, `std`: standard deviation over the units of the mean norms.

    Raises:
        ValueError: a norm is not finite.
    """
    deviations = norm_spread(totals)
    for name, deviation in deviations.items():
        if not math.isfinite(deviation):
            raise ValueError(
                f"the activations of {name} are not finite: the model has diverged, or its dtype "
                "is too small. Give --dtype float32"
            )
    return {
        "protocol": protocol,
        "samples": next(iter(totals.values())).samples,
        "groups": {
            group.name: {
                "unit": group.unit,
                "layer": describe_weight(group.name)["layer"],
                "mean_norm": totals[group.name].mean_norms().tolist(),
                "score": totals[group.name].scores.tolist(),
                "std": deviations[group.name],
            }
            for group, _ in groups
        },
    }
