"""What an observation is asked for, and the texts that it reads: checked before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_composer.evaluate.texts import Texts, read_texts
from apex_composer.extras import needing
from apex_composer.observe.activations import PAPER_SAMPLES
from apex_composer.observe.masking import MASK_BY
from apex_composer.settings import check_choice

PROTOCOLS = ("sequences", "paper")


@dataclass(frozen=True)
class Settings:
    """What is observed, and how; the command's options say what each means."""

    data: Path | None = None
    protocol: str = "sequences"
    samples: int | None = None
    sequence_length: int = 2048
    seed: int = 17
    threshold: float = 0.125
    targets: tuple[str, ...] = ("head", "channel")
    mask: tuple[float, ...] = ()
    mask_by: str = "average"
    ranks: bool = False
    delta: Path | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse what cannot work before anything large is read.

        Raises:
            ValueError, FileNotFoundError: naming the option, and what to give.
        """
        check_choice("--protocol", self.protocol, PROTOCOLS)
        check_choice("--mask-by", self.mask_by, MASK_BY)
        if self.data is None and not self.ranks and self.delta is None:
            raise ValueError("nothing to observe: give --data, --ranks or --delta")
        if self.data is not None and not self.data.exists():
            raise FileNotFoundError(f"--data: {self.data} does not exist")
        if self.delta is not None and not self.delta.exists():
            raise FileNotFoundError(
                f"--delta: {self.delta} does not exist. Allowed: a model's folder or checkpoint"
            )
        if self.mask and self.data is None:
            raise ValueError("--mask needs --data: texts on which the loss is measured")
        for share in self.mask:
            if not 0 < share <= 1:
                raise ValueError(
                    f"--mask: got {share}, allowed: a share above 0, to 1, such as 0.1"
                )
        if not 0 < self.threshold <= 0.5:
            raise ValueError(f"--threshold: got {self.threshold}, allowed: above 0, to 0.5")
        if self.protocol == "paper" and self.samples not in (None, PAPER_SAMPLES):
            raise ValueError(
                f"--samples: got {self.samples}, and the paper's protocol has {PAPER_SAMPLES}: "
                "leave one of both out"
            )

    @property
    def wanted_samples(self) -> int | None:
        """How many samples are read at most."""
        return PAPER_SAMPLES if self.protocol == "paper" else self.samples

    @property
    def wanted_targets(self) -> tuple[str, ...] | None:
        """None for both: then `find_sites` refuses modules that it does not know."""
        return None if set(self.targets) == {"head", "channel"} else self.targets


def read_before_loading(source: str, settings: Settings) -> Texts | None:
    """The texts before the weights are loaded, where a tokenizer can be had without the model."""
    if settings.data is None or not (Path(source) / "tokenizer_config.json").is_file():
        return None
    with needing("apex-composer observe"):
        from transformers import AutoTokenizer
    return read_samples(settings, AutoTokenizer.from_pretrained(source))


def read_samples(settings: Settings, tokenizer: Any) -> Texts:
    """The samples of `--data`, as the protocol cuts them.

    Raises:
        FileNotFoundError, ValueError: as `read_texts`; there are too few.
    """
    texts = read_texts(
        settings.data,
        tokenizer,
        sequence_length=settings.sequence_length,
        samples=settings.wanted_samples,
        seed=settings.seed,
        cut="documents" if settings.protocol == "paper" else "sequences",
    )
    found = sum(map(len, texts.domains.values()))
    if settings.protocol == "paper" and found < PAPER_SAMPLES:
        raise ValueError(
            f"--protocol paper: {settings.data} has {found} samples, and it needs {PAPER_SAMPLES}. "
            "Give more data, or leave the protocol out"
        )
    return texts
