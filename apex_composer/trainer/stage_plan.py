"""Where the stages of a run end: plain data, for checkpoints and for commands without a trainer."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """Where the stages of a run end, in one unit of time.

    Attributes:
        unit: `ba`, `tok` or `sp`.
        ends: of every stage, counted from the start of training, ascending.
        expansion: whether the stage trains operators.
    """

    unit: str
    ends: tuple[int, ...]
    expansion: tuple[bool, ...]

    @classmethod
    def from_state(cls, saved: dict[str, Any] | list[str]) -> "StagePlan":
        """The plan that a checkpoint holds; those of version 0.1 have what `describe` shows."""
        if isinstance(saved, dict):
            return cls(saved["unit"], tuple(saved["ends"]), tuple(saved["expansion"]))
        times = [text.split()[0] for text in saved]
        unit = times[0].lstrip("0123456789")
        ends = tuple(int(time.removesuffix(unit)) for time in times)
        return cls(unit, ends, tuple(not text.endswith(" (plain)") for text in saved))

    def state_dict(self) -> dict[str, Any]:
        """As checkpoints keep it."""
        return {"unit": self.unit, "ends": list(self.ends), "expansion": list(self.expansion)}

    def ended(self, timestamp: Any) -> int:
        """How many stages are over by Composer's clock; the current one's index unless all are."""
        now = timestamp.get(self.unit).value
        return sum(now >= end for end in self.ends)

    def starts(self) -> tuple[int, ...]:
        """Where the stages begin."""
        return (0, *self.ends[:-1])

    def first(self, count: int) -> "StagePlan":
        """The plan of the first stages only."""
        return StagePlan(self.unit, self.ends[:count], self.expansion[:count])

    def describe(self) -> list[str]:
        """The stages' ends as Composer time strings, plain ones marked."""
        marks = ["" if expansion else " (plain)" for expansion in self.expansion]
        return [f"{end}{self.unit}{mark}" for end, mark in zip(self.ends, marks, strict=True)]
