"""The arms of the comparison: what is continued from the base, and with which learning rates.

All arms of a seed see the same batches in the same order. An arm's name says what it is; results
keep its settings beside it.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reproduce.scales import Scale

SCHEDULES = ("constant", "stagewise", "wsd")
# Share of a run in which warmup-stable-decay falls to zero.
DECAY_SHARE = 0.2
# Every stage's share of the rate (paper A.3: 1e-4, 4e-5, 1e-5, 5e-6, 1e-6), for an arm of more
# stages than its scale has.
PAPER_RATES = (1.0, 0.4, 0.1, 0.05, 0.01)
# The average of a run's checkpoints takes so many, evenly from its second half.
AVERAGED = 5


@dataclass(frozen=True)
class Arm:
    """One way to go on from a base.

    Attributes:
        name: of its results.
        schedule: `constant`; `stagewise`, the scale's rates by stage; `wsd`, constant and then
            linearly to zero over the last fifth.
        rate: factor of the scale's learning rate.
        apex: settings of `Expander`; None trains conventionally.
        averaged: whether the mean of the run's checkpoints is a result as well.
        keep_optimizer: go on with the base's optimizer state, or with a fresh one.
        base: which base, see `bases.py`.
        study: what it belongs to: `main`, or the question that it varies one thing for.
        variation: settings of `variations.py`; empty for APEX as it is.
        stage_batches: factor of the scale's batches per stage, and so of the whole run's.
        stages: number of stages that the whole run's batches are divided into, with the first of
            the scale's rates, and the paper's after them; default as many as the scale has.
        share: of the seeds' number: `seeds`, `other_seeds`, `study_seeds`, `followed_seeds` or
            `confirm_seeds` of the scale.
        first_seed: the first of its seeds.
    """

    name: str
    schedule: str = "stagewise"
    rate: float = 1.0
    apex: Mapping[str, Any] | None = None
    averaged: bool = False
    keep_optimizer: bool = True
    base: str = "mixture"
    study: str = "main"
    variation: Mapping[str, Any] = field(default_factory=dict)
    stage_batches: float = 1.0
    stages: int | None = None
    share: str = "other_seeds"
    first_seed: int = 1

    def __post_init__(self) -> None:
        if self.variation and self.apex is None:
            raise ValueError(
                f"variation: {self.name} varies {', '.join(self.variation)} of APEX and has none: "
                "give apex, {} for the paper's settings"
            )

    def seeds(self, scale: Scale) -> range:
        """Its seeds."""
        return range(self.first_seed, self.first_seed + getattr(scale, self.share))

    def stage_ends(self, scale: Scale) -> list[int]:
        """Batches after which its stages end.

        Raises:
            ValueError: where it has more stages than the paper has rates.
        """
        stages = self.stages or len(scale.rates)
        if stages > len(PAPER_RATES):
            raise ValueError(
                f"stages: {self.name} has {stages}, allowed: at most {len(PAPER_RATES)}, for which "
                "the paper has rates"
            )
        length = max(1, round(self.stage_batches * scale.batches / stages))
        return [length * (stage + 1) for stage in range(stages)]

    def learning_rate(self, scale: Scale, place: int) -> float:
        """Of batch number `place`, counted from 0."""
        ends = self.stage_ends(scale)
        peak = self.rate * scale.rate
        if self.schedule == "stagewise":
            stage = next(i for i, end in enumerate(ends) if place < end)
            return peak * (*scale.rates, *PAPER_RATES[len(scale.rates) :])[stage]
        decayed = DECAY_SHARE * ends[-1]
        if self.schedule == "wsd" and place >= ends[-1] - decayed:
            return peak * (ends[-1] - place) / decayed
        return peak

    def facts(self) -> dict[str, Any]:
        """All settings, as every result keeps them."""
        found = asdict(self)
        return {name: found[name] for name in found if name not in ("share", "first_seed")}


def main_arms() -> list[Arm]:
    """The comparison of the paper, with the baselines that it lacks."""
    scratch = {"base": "scratch", "study": "scratch", "share": "study_seeds"}
    return [
        Arm("vanilla_constant", "constant", averaged=True, share="seeds"),
        Arm("vanilla_stagewise", share="seeds"),
        Arm("apex_rank", apex={}, share="seeds"),
        Arm("apex_random", apex={"method": "random"}, share="seeds"),
        Arm("apex_average", apex={"method": "average"}),
        Arm("selection_only", apex={"expansion": False}),
        # Its rows have moments of their own, which begin at zero: it is compared with a fresh one.
        Arm("weak_units_only", apex={"trainable": "disadvantageous"}, keep_optimizer=False),
        Arm("vanilla_wsd", "wsd"),
        *(Arm(f"vanilla_rate_{rate:g}", "constant", rate=rate) for rate in (0.4, 0.2, 0.1)),
        Arm("vanilla_stagewise_fresh", keep_optimizer=False),
        Arm("apex_rank_fresh", apex={}, keep_optimizer=False),
        Arm("scratch_vanilla", **scratch),
        # Conventional first (paper C.3).
        Arm("scratch_apex", apex={}, variation={"plain_stages": 1}, **scratch),
    ]


def stops(place: int, end: int, averaged: Collection[int] = ()) -> list[int]:
    """Where a stage stops for a moment: at checkpoints and now and then.

    Between two of these a record has the mean of the losses of the batches, each before its step.

    Args:
        place: batches before it.
        end: batches at its end.
        averaged: batches after which there is a checkpoint.
    """
    every = max(1, (end - place) // 5)
    own = {*range(place + every, end, every), end}
    return sorted(own | {stop for stop in averaged if place < stop <= end})


def same_schedule(first: Arm, second: Arm) -> bool:
    """Whether two arms go on from one base, with one learning rate at every batch, and with moments
    that begin from zero in every stage or with none that do.
    """
    settings = ("schedule", "rate", "keep_optimizer", "base", "stage_batches", "stages")
    fresh = [bool(arm.variation.get("fresh_moments")) for arm in (first, second)]
    return fresh[0] == fresh[1] and all(
        getattr(first, name) == getattr(second, name) for name in settings
    )


def is_conventional(arm: Arm) -> bool:
    """Whether it trains without APEX; moments that begin anew in every stage need its stages."""
    stages_alone = arm.apex == {"expansion": False} and arm.variation == {"fresh_moments": True}
    return arm.apex is None or stages_alone
