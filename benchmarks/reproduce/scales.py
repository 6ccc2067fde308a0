"""The three sizes of the one protocol: what a base is, how it goes on, how often it is repeated."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of a Llama model.

    Attributes:
        hidden: width.
        layers: number.
        heads: query heads.
        kv_heads: key and value heads.
        channels: of a layer's FFN.
        length: tokens of a window.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    length: int


@dataclass(frozen=True)
class TextNeeds:
    """Of the text that is prepared.

    Attributes:
        vocabulary: tokens of the tokenizer.
        domain_bytes: bytes of text in a domain at most.
        held_out_tokens: of every domain, for evaluation.
    """

    vocabulary: int
    domain_bytes: int
    held_out_tokens: int


@dataclass(frozen=True)
class Scale:
    """One size of the protocol.

    Attributes:
        name: smoke, cpu or gpu.
        sizes: of the model.
        text: what is prepared; None where it is a few pages of this repository.
        batch: windows of a batch.
        base_batches: of the base's training.
        warmup: batches of it in which the rate rises.
        base_rate: its peak learning rate.
        base_end: share of the peak at its end, to which a cosine leads. TinyLLaMA ended at 4e-5
            and is continued at 1e-4: 0.4.
        rate: learning rate of the first stage.
        stage_batches: of every stage; rate * stage_batches is about 1, as in the paper.
        rates: every stage's share of the rate (paper A.3: 1e-4, 4e-5, 1e-5).
        seeds: of the arms that are compared with each other: vanilla, vanilla stage-wise, APEX by
            rank and at random.
        other_seeds: of the other arms.
        study_seeds: of every variation at first. One tells much where pairs scatter little: on the
            scale `cpu` by 0.0001 nats, a fiftieth of what is to be seen.
        followed_seeds: of a variation that then ended lower than plain training by more than
            chance.
        confirm_seeds: of what looked best with these, fresh ones.
        at_once: windows of one forward pass in evaluations.
        workers: runs at a time; each has one thread of the CPU.
        probe_windows: batches for gradient scores, the first assessment and other measurements.
        device: where it runs.
        duration: what the main comparison takes with its base, as it is said beforehand.
    """

    name: str
    sizes: Sizes
    text: TextNeeds | None
    batch: int
    base_batches: int
    warmup: int
    base_rate: float
    base_end: float
    rate: float
    stage_batches: int
    rates: tuple[float, ...] = (1.0, 0.4, 0.1)
    seeds: int = 5
    other_seeds: int = 2
    study_seeds: int = 3
    followed_seeds: int = 3
    confirm_seeds: int = 5
    at_once: int = 64
    workers: int = 1
    probe_windows: int = 16
    device: str = "cpu"
    duration: str = ""

    @property
    def batches(self) -> int:
        """Of a whole continued run."""
        return self.stage_batches * len(self.rates)

    def facts(self) -> dict[str, Any]:
        """All settings, as every result keeps them."""
        return asdict(self)


SCALES = {
    "smoke": Scale(
        "smoke", Sizes(32, 2, 8, 8, 48, 32), None, batch=4, base_batches=24, warmup=4,
        base_rate=2e-3, base_end=0.4, rate=2e-3, stage_batches=5, rates=(1.0, 0.4), seeds=2,
        other_seeds=1, study_seeds=1, followed_seeds=1, confirm_seeds=1, at_once=32,
        probe_windows=2, duration="20 seconds",
    ),
    "cpu": Scale(
        "cpu", Sizes(96, 4, 8, 8, 256, 128), TextNeeds(2048, 40_000_000, 200_000), batch=8,
        base_batches=24_000, warmup=200, base_rate=2e-3, base_end=0.2, rate=1e-3,
        stage_batches=1000, rates=(1.0, 0.4, 0.1), study_seeds=1, workers=2,
        duration="about 4 hours on 2 cores, of which the base takes 45 minutes",
    ),
    # The first stage, at equal rates, which decay does not explain.
    "gpu": Scale(
        "gpu", Sizes(1024, 8, 16, 16, 2816, 1024), TextNeeds(8192, 80_000_000, 250_000), batch=8,
        base_batches=4_000, warmup=200, base_rate=1e-3, base_end=0.4, rate=1e-3,
        stage_batches=1000, rates=(1.0,), seeds=3, at_once=32, device="cuda",
        duration="about 30 minutes on an H100, of which the base takes 3",
    ),
}  # fmt: skip
