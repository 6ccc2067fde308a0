"""What a preparation of instruction data shall do, and what it calls its files."""

from dataclasses import dataclass

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import MEGABYTE

# The loader takes the name of a file for that of a split.
SPLIT_FILES = {"train": "train.jsonl", "validation": "validation.jsonl"}
# Options that change no byte of the examples: a run may be continued with others.
FREE = ("max_reject_rate",)


@dataclass(frozen=True)
class InstructOptions:
    """What a preparation of instruction data shall do.

    Args:
        sequence_length: tokens of an example at most, the YAML's `max_seq_len`. Default: 4096.
        validation_share: part of the examples that is held out, in [0, 1). Default: 0.01.
        chat_template: "tulu", or a file that holds a template; None takes the tokenizer's own, and
            Tulu's where it has none. Default: None.
        max_reject_rate: allowed share of unusable lines, in [0, 1). Default: 0.01.
        piece_bytes: bytes of a plain file that one worker takes at a time. Default: 64 MB.

    Raises:
        SettingsError: an option is out of range; the message names it.
    """

    sequence_length: int = 4096
    validation_share: float = 0.01
    chat_template: str | None = None
    max_reject_rate: float = 0.01
    piece_bytes: int = 64 * MEGABYTE

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("piece_bytes", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("validation_share", "max_reject_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must lie in [0, 1).")
