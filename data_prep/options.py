"""The options of a preparation, checked before any file is read."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from apex_composer.data_prep.errors import SettingsError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MEGABYTE = 1 << 20
# Options that change neither a token nor its place: a run may be continued with others.
FREE = ("max_reject_rate", "streams_folder")
# Options of earlier versions, at the values that they had in every preparation but the demo's.
FORMER = {"shares": None, "text_limit": None, "tokenizer_training": {}}


@dataclass(frozen=True)
class Options:
    """What a preparation shall do.

    Args:
        sequence_length: tokens in a sequence. Default: 4096.
        format: layout of the input; "auto" looks at it. Default: "auto".
        val_tokens: tokens of the validation set; None holds nothing out. Default: 2,000,000.
        val_per_domain: `val_tokens` for every domain, not for all together. Default: False.
        train_tokens: tokens of `train`; None takes all that is left when `cpt_tokens` is None
            too, else nothing. Default: None.
        cpt_tokens: tokens of `cpt`, continued pre-training; None makes no such split.
            Default: None.
        proportions: parts of the domains, for budgets and streams; None: equal. Default: None.
        max_reject_rate: allowed share of unusable lines, in [0, 1). Default: 0.001.
        compression: None or "zstd". Default: None.
        shard_bytes: size of an MDS shard at most, before compression. Default: 64 MB.
        piece_bytes: bytes of a plain file that one worker takes at a time. Default: 64 MB.
        estimate_margin: how many times the documents that a budget is expected to need are
            tokenised. Default: 1.3.
        streams_folder: folder of the shards as the `streams:` block names it; None takes the
            output folder. Default: None.

    Raises:
        SettingsError: an option is out of range; the message names it.
    """

    sequence_length: int = 4096
    format: str = "auto"
    val_tokens: int | None = 2_000_000
    val_per_domain: bool = False
    train_tokens: int | None = None
    cpt_tokens: int | None = None
    proportions: dict[str, float] | None = None
    max_reject_rate: float = 0.001
    compression: str | None = None
    shard_bytes: int = 64 * MEGABYTE
    piece_bytes: int = 64 * MEGABYTE
    estimate_margin: float = 1.3
    streams_folder: str | None = None

    def __post_init__(self) -> None:
        _at_least(2, sequence_length=self.sequence_length)
        for name in ("val_tokens", "train_tokens", "cpt_tokens"):
            if getattr(self, name) is not None:
                _at_least(self.sequence_length, **{name: getattr(self, name)})
        _at_least(1, piece_bytes=self.piece_bytes, estimate_margin=self.estimate_margin)
        # Two sequences of uint32 and a header; a shard beyond 2 GB would outgrow MDS' offsets.
        _at_least(8 * self.sequence_length + 1024, shard_bytes=self.shard_bytes)
        if self.shard_bytes > 2 << 30:
            raise SettingsError(f"shard_bytes={self.shard_bytes} must be at most {2 << 30}.")
        if not 0 <= self.max_reject_rate < 1:
            raise SettingsError(f"max_reject_rate={self.max_reject_rate} must lie in [0, 1).")
        if self.compression not in (None, "zstd"):
            raise SettingsError(f"compression={self.compression!r} must be None or 'zstd'.")
        if self.val_per_domain and self.val_tokens is None:
            raise SettingsError("val_per_domain=True needs val_tokens.")

    @property
    def budgets(self) -> dict[str, int | None]:
        """Tokens of every split, None for all that is left; the smallest hashes fill the first."""
        tokens = {"validation": self.val_tokens, "train": self.train_tokens, "cpt": self.cpt_tokens}
        rest = "train" if self.takes_all else None
        return {name: count for name, count in tokens.items() if count or name == rest}

    @property
    def takes_all(self) -> bool:
        """Whether every document goes into some split."""
        return self.train_tokens is None and self.cpt_tokens is None

    def identity(self) -> dict[str, Any]:
        """The options that decide the output's bytes."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}


def read_options(content: dict[str, Any]) -> Options:
    """Make options from what JSON holds of them.

    Args:
        content: `options` of a plan or a manifest.

    Raises:
        SettingsError: an earlier version's demo wrote it.
    """
    for name, value in FORMER.items():
        if content.get(name, value) != value:
            raise SettingsError(
                f"{name}={content[name]!r}: the demo of an earlier version made this preparation. "
                "Remove it, or use the version that began it."
            )
    return Options(**{key: value for key, value in content.items() if key not in FORMER})


def parse_amount(text: str) -> int:
    """Read a number with a unit: `2M` is 2,000,000 and `4B` is 4,000,000,000.

    Args:
        text: digits, and one of k, M, B (10^9) and T at most.

    Raises:
        SettingsError: it is something else.
    """
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmbt]?)\s*", text, re.IGNORECASE)
    if not match:
        raise SettingsError(
            f"{text!r} is no amount. Give a number such as 500k, 2M, 4B or 2000000."
        )
    return round(float(match[1]) * UNITS[match[2].lower()])


def _at_least(least: float, **options: float) -> None:
    for name, value in options.items():
        if value < least:
            raise SettingsError(f"{name}={value} must be at least {least}.")
