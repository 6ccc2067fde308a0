"""Shares of the documents: the splits of the demo, which has no budgets."""

from apex_composer.data_prep.errors import SettingsError

VALIDATION = "validation"
PRETRAIN = "pretrain"
TRAIN = "train"
SPLITS = (VALIDATION, PRETRAIN, TRAIN)


def make_shares(validation_share: float, pretrain_share: float) -> dict[str, float]:
    """Build the shares of the three splits; validation comes first, so that changing the share of
    pre-training never moves a document into or out of it.

    Args:
        validation_share: share of documents held out, above 0.
        pretrain_share: share for the base model, above 0; continued pre-training takes the rest.

    Raises:
        SettingsError: a share is not above 0, or the two leave nothing for continued pre-training.
    """
    given = {"validation_share": validation_share, "pretrain_share": pretrain_share}
    for name, share in given.items():
        if not 0 < share < 1:
            raise SettingsError(f"{name}={share} must lie between 0 and 1, both excluded.")
    rest = 1 - validation_share - pretrain_share
    if rest <= 0:
        raise SettingsError(
            f"validation_share={validation_share} and pretrain_share={pretrain_share} leave no "
            "document for continued pre-training. Their sum must be below 1."
        )
    return {VALIDATION: validation_share, PRETRAIN: pretrain_share, TRAIN: rest}
