"""Assign every document to a split by a hash of its text."""

import hashlib
from collections.abc import Mapping

VALIDATION = "validation"
PRETRAIN = "pretrain"
TRAIN = "train"
SPLITS = (VALIDATION, PRETRAIN, TRAIN)


def unit_interval(text: str) -> float:
    """Map a text to a number in [0, 1) that depends on nothing but the text.

    Args:
        text: the document.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    # 53 bits are what a float holds: with all 64 the largest values would round up to 1.0.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose_split(text: str, shares: Mapping[str, float]) -> str:
    """Name the split of a document; equal texts get equal splits.

    Args:
        text: the document.
        shares: split names and their shares of documents, in the order in which they divide the
            unit interval; the last split takes what the shares leave.
    """
    position = unit_interval(text)
    boundary = 0.0
    for name, share in shares.items():
        boundary += share
        if position < boundary:
            return name
    return name


def make_shares(validation_share: float, pretrain_share: float) -> dict[str, float]:
    """Build the shares of the three splits; validation comes first, so that changing the share of
    pre-training never moves a document into or out of it.

    Args:
        validation_share: share of documents held out, above 0.
        pretrain_share: share for the base model, above 0; continued pre-training takes the rest.

    Raises:
        ValueError: a share is not above 0, or the two leave nothing for continued pre-training.
    """
    given = {"validation_share": validation_share, "pretrain_share": pretrain_share}
    for name, share in given.items():
        if not 0 < share < 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1, both excluded.")
    rest = 1 - validation_share - pretrain_share
    if rest <= 0:
        raise ValueError(
            f"validation_share={validation_share} and pretrain_share={pretrain_share} leave no "
            "document for continued pre-training. Their sum must be below 1."
        )
    return {VALIDATION: validation_share, PRETRAIN: pretrain_share, TRAIN: rest}
