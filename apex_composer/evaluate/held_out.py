"""The perplexity of held-out text as `eval` reports it, with what it depends on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_composer.evaluate.identity import check_positions
from apex_composer.evaluate.perplexity import mean_loss
from apex_composer.evaluate.texts import read_texts


def measure_held_out(
    opened: Any,
    source: Path,
    *,
    sequence_length: int,
    batch_size: int,
    identity: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Loss of a model on text, for each domain and in all.

    Args:
        opened: has the model and its tokenizer.
        source: as `read_texts` takes it.
        sequence_length: tokens of a sequence.
        batch_size: sequences at once.
        identity: what else must agree for a result to be used again.
        before: an earlier result, which is returned when it is of the same text and identity.

    Raises:
        ValueError: the sequences are longer than the model's positions.
    """
    check_positions(opened.model.config, sequence_length)
    texts = read_texts(source, opened.tokenizer, sequence_length=sequence_length)
    identity = {
        **identity,
        "texts_sha256": texts.sha256,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
    }
    if before is not None and before["identity"] == identity:
        return dict(before)
    measured = asdict(mean_loss(opened.model, texts, batch_size=batch_size))
    return {"identity": identity, **measured, "left_out": texts.left_out}
