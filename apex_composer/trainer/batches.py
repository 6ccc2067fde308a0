"""What a batch says of its tokens: which are padding, and which rows are packed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from apex_composer.assessment.collector import Assessment
from apex_composer.ops.packed_samples import is_packed


class Layout(NamedTuple):
    """What a look at a batch on the CPU has told: whether it has padding, and packed rows."""

    padded: bool
    packed: bool


def look_at(batch: Any) -> Layout:
    """How a batch is laid out; a mask or ids on a GPU are not waited for, and count as such."""
    mask = attention_mask(batch)
    padded = mask is not None and (mask.is_cuda or not bool(mask.all()))
    return Layout(padded, sequence_ids(batch) is not None)


def open_assessment(assessment: Assessment, batch: Any, layout: Layout) -> None:
    """Count the forward passes of a batch, or of its microbatches, from here on."""
    ids = batch["sequence_id"] if layout.packed else None
    assessment.open(attention_mask(batch), ids, full=not layout.padded)


def attention_mask(batch: Any) -> Tensor | None:
    """A batch's mask of real tokens, [samples, tokens] bool, or None where it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if mask is not None else None


def sequence_ids(batch: Any) -> Tensor | None:
    """Which sequence each token of a packed batch belongs to, or None where no row is packed."""
    ids = batch.get("sequence_id") if isinstance(batch, Mapping) else None
    return ids if ids is not None and (ids.is_cuda or is_packed(ids)) else None


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, padding not counted."""
    mask = attention_mask(batch)
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
