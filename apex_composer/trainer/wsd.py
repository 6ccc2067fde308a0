"""The scheduler `wsd`: warm-up, stable, decay, once or in cycles."""

import math
from dataclasses import dataclass
from typing import Any

from apex_composer.extras import needing

with needing("WSDScheduler"):  # first: the modules below need it, too
    from composer.core import State, Time
    from composer.optim import ComposerScheduler

from apex_composer.settings import check_choice, check_finite, check_keys
from apex_composer.trainer.stages import convert, parse_duration

# What is left between alpha_i and alpha_f after a share x of the decay.
REMAINING = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
_UNITS = ("ba", "sp", "tok")
_SETTINGS = ("t_warmup", "t_decay", "decay", "alpha_i", "alpha_f", "t_cycle")


@dataclass(frozen=True)
class Spans:
    """The spans of a schedule in a run, in units of its clock.

    Attributes:
        unit: `ba`, `tok` or `sp`.
        total: length of the run.
        cycle: length of a cycle; `total` where there is only one.
        warmup: span at a cycle's start.
        decay: span at a cycle's end.
    """

    unit: str
    total: int
    cycle: int
    warmup: int
    decay: int

    def seams(self) -> list[int]:
        """Where a span begins or ends, ascending, from 0 to `total`."""
        inner = (0, self.warmup, self.cycle - self.decay)
        starts = range(0, self.total, self.cycle)
        return sorted({start + seam for start in starts for seam in inner} | {self.total})


class WSDScheduler(ComposerScheduler):
    """Warm-up, stable, decay: lr(t) = lr * alpha(t), by the time s = t mod C within a cycle of C.

        alpha(t) = alpha_0 + (alpha_i - alpha_0) s / W              for s < W, the warm-up
                 = alpha_i                                          for W <= s < C - D
                 = alpha_f + (alpha_i - alpha_f) r((s - C + D) / D) from there on, the decay

    with r(x) = 1 - sqrt(x), 1 - x or (1 + cos(pi x)) / 2, and with alpha_0 = 0 in the first
    cycle, alpha_f in those after it, which go on from the decayed weights (WSD-S).

    t is what Composer's clock says when it steps schedulers, before that advances: batch n is
    trained with alpha(n - 1), the first one with alpha(0), and the last one of N with alpha(N - 2),
    so none with alpha_f itself. Composer's own schedulers are late by the same batch.

    Sources: MiniCPM (arXiv 2404.06395), 1-sqrt by Hägele et al. (arXiv 2405.18392), cycles by Wen
    et al. (arXiv 2410.05192), whose warm-up between two cycles is our choice.

    Args:
        t_warmup: W, a Composer time string in the unit of max_duration, ep, or dur, a share of the
            run (not of a cycle). Default `0ba`.
        t_decay: D. Default `0.1dur`, MiniCPM's tenth.
        decay: `1-sqrt`, `linear` or `cosine`. Default `1-sqrt`.
        alpha_i: what the rate is multiplied by while it is stable. Default 1.
        alpha_f: what it decays to, over the optimizer's lr and not over alpha_i. Default 0.
        t_cycle: C, of which the run must be a multiple. Default: the run.

    Raises:
        ValueError: for settings out of range; when the trainer is built, for what does not fit the
            run.
        TypeError: for unknown settings.
    """

    def __init__(
        self,
        t_warmup: str = "0ba",
        t_decay: str = "0.1dur",
        decay: str = "1-sqrt",
        alpha_i: float = 1.0,
        alpha_f: float = 0.0,
        t_cycle: str | None = None,
        **unknown: Any,
    ):
        check_keys("wsd", unknown, _SETTINGS)
        self.t_warmup = parse_duration("t_warmup", t_warmup, zero=True)
        self.t_decay = parse_duration("t_decay", t_decay)
        self.t_cycle = None if t_cycle is None else parse_duration("t_cycle", t_cycle)
        check_choice("decay", decay, tuple(REMAINING))
        self.decay = decay
        self.alpha_i = check_finite("alpha_i", alpha_i, "a number of 0 or more", lowest=0.0)
        self.alpha_f = check_finite("alpha_f", alpha_f, "a number of 0 or more", lowest=0.0)
        if self.alpha_f > self.alpha_i:
            raise ValueError(
                f"alpha_f: got {alpha_f}, allowed: no more than alpha_i, which is {alpha_i}"
            )

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """What the base learning rate is multiplied by at the state's time."""
        if ssr != 1.0:
            raise ValueError(f"scale_schedule_ratio: got {ssr}, allowed with wsd: 1.0")
        spans = self.spans(state)
        return self.multiplier(state.timestamp.get(spans.unit).value, spans)

    def multiplier(self, time: int, spans: Spans) -> float:
        """alpha(t) of the formula above; after the run's end what it has there."""
        time = min(time, spans.total)
        cycle = min(time // spans.cycle, spans.total // spans.cycle - 1)
        since = time - cycle * spans.cycle
        if since < spans.warmup:
            start = self.alpha_f if cycle else 0.0
            return start + (self.alpha_i - start) * since / spans.warmup
        decaying = since - (spans.cycle - spans.decay)
        if decaying <= 0:
            return self.alpha_i
        remaining = REMAINING[self.decay](decaying / spans.decay)
        return self.alpha_f + (self.alpha_i - self.alpha_f) * remaining

    def spans(self, state: State) -> Spans:
        """The schedule in this run.

        Raises:
            ValueError: it does not fit the run.
        """
        if state.max_duration is None:
            raise ValueError(
                "max_duration: not given, but wsd decays towards it: give it when the trainer is "
                "built, not to fit() only"
            )
        total = convert(state.max_duration, state)
        unit, run = total.unit.value, f"max_duration {state.max_duration}"
        if unit not in _UNITS:
            raise ValueError(
                f"max_duration: got {state.max_duration}, allowed with wsd: ba, sp, tok, ep"
            )
        warmup = _length("t_warmup", self.t_warmup, total, run, state)
        decay = _length("t_decay", self.t_decay, total, run, state)
        cycle = total.value
        if self.t_cycle is not None:
            cycle = _length("t_cycle", self.t_cycle, total, run, state)
        if total.value % cycle:
            raise ValueError(
                f"t_cycle: got {self.t_cycle} ({cycle}{unit}), allowed: a length of which the run "
                f"is a multiple ({run} = {total.value}{unit})"
            )
        if warmup + decay > cycle:
            raise ValueError(
                f"t_warmup, t_decay: got {self.t_warmup} and {self.t_decay}, together "
                f"{warmup + decay}{unit}, allowed: no longer than "
                f"{'a cycle' if self.t_cycle else 'the run'} ({cycle}{unit})"
            )
        return Spans(unit, total.value, cycle, warmup, decay)


def _length(name: str, time: Time, total: Time, run: str, state: State) -> int:
    """A span in the run's unit; only what is given as 0 may be empty."""
    length, unit = convert(time, state), total.unit.value
    if time.value == 0:
        return 0
    if length.unit != total.unit:
        raise ValueError(
            f"{name}: got {time}, but the clock of the run is in {unit} ({run}): give both in the "
            "same unit, or this one as a share of training (dur)"
        )
    if length.value == 0:
        raise ValueError(f"{name}: got {time}, which is less than 1{unit} ({run}): give 1{unit}")
    return length.value
