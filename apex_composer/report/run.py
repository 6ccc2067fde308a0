"""A run as a report sees it: numbers and curves, from whatever it has logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A number that was logged again and again.

    Attributes:
        batches: batches trained before each value, rising.
        tokens: tokens trained before each value; empty where a run has not kept them.
        values: one for each.
    """

    batches: Sequence[int]
    tokens: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Stage:
    """A stage of APEX.

    Attributes:
        number: from 0.
        batch: its first.
        expansion: whether it trains operators.
        units: `head`, `kv_head` or `channel` of each group, in the order of the layers.
        advantageous: selected units by group.
        disadvantageous: the same of the other side.
        overlap: Jaccard index of both sets with the last stage's, by group; empty at the first.
        norm_std: standard deviation of mean activation norms by group.
        scores: of each unit by group, those that the selection came from; None where a run did
            not keep them.
    """

    number: int
    batch: int
    expansion: bool
    units: Mapping[str, str]
    advantageous: Mapping[str, Sequence[int]]
    disadvantageous: Mapping[str, Sequence[int]]
    overlap: Mapping[str, Sequence[float]]
    norm_std: Mapping[str, float]
    scores: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True)
class Run:
    """What one run did.

    Attributes:
        name: its run_name; names that two runs share get their folders' names.
        folder: where it was read.
        settings: the run's YAML as it was used, flat: `algorithms.apex.threshold` to its value.
        versions: packages and Python.
        device: GPU or CPU, with their number.
        data: what is known of the training data: a manifest's totals, hashes; may be empty.
        loss: training loss per batch, nats per token.
        validation: loss on held-out text by domain, nats per token.
        validation_tokens: predicted tokens by domain, which weight the total; may be empty.
        step_seconds: duration of each batch, evaluation left out.
        metrics: every other logged number by its name, such as `throughput/device/mfu`.
        stages: of APEX, in order; empty without it.
        observations: contents of the `observe.json` files in its folder, by file name.
        missing: what a report would show and this run has not kept, with the reason or the remedy.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    data: Mapping[str, Any]
    loss: Curve
    validation: Mapping[str, Curve]
    validation_tokens: Mapping[str, int]
    step_seconds: Sequence[float]
    metrics: Mapping[str, Curve] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    observations: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
