"""What docs/results.md says has not been run, and what runs it."""

from collections.abc import Iterator, Sequence

from reproduce.records import Record
from reproduce.scales import SCALES
from reproduce.studies import arms_of, studies

WHY = {"cpu": "about 4 hours on 2 cores", "gpu": "when a GPU is lent, 25 minutes each time"}


def pending(scale: str, records: Sequence[Record], lost: Sequence[Record]) -> Iterator[str]:
    """What of a campaign has not been run, and what runs it; what has diverged is no more to come.

    Args:
        scale: its name.
        records: its results.
        lost: of runs that have diverged.
    """
    make = f"make reproduce SCALE={scale}"
    if not records:
        yield f"- **Campaign `{scale}`** (`{make}`, {WHY[scale]}): no results yet."
        return
    known, diverged = set(map(_run, records)), set(map(_run, lost))
    unasked = []
    for study in studies():
        wanted = runs_of(study, scale)
        gone = [run for run in wanted if (study, *run) in diverged - known]
        missing = [run for run in wanted if (study, *run) not in known | diverged]
        if missing and len(missing) == len(wanted):
            unasked.append(f"`{study}`")
        elif missing or gone:
            yield (
                f"- **Campaign `{scale}`, question `{study}`**: "
                f"{len(wanted) - len(missing) - len(gone)} of {len(wanted)} runs are in."
                + (f" Diverged, so without a result: {_arms_with_seeds(gone)}." if gone else "")
                + (f" Missing (seeds): {_arms_with_seeds(missing)}.\n" if missing else "")
                + (f'  `{make} CAMPAIGN="--study {study}"` goes on.' if missing else "")
            )
    if unasked:
        yield f"- **Campaign `{scale}`**, questions not begun: {', '.join(unasked)}."


def _run(record: Record) -> tuple[str, str, int]:
    return record["study"], record["arm"], record["seed"]


def _arms_with_seeds(runs: Sequence[tuple[str, int]]) -> str:
    seeds = {arm: [str(seed) for own, seed in runs if own == arm] for arm, _ in runs}
    return ", ".join(f"`{arm}` ({', '.join(own)})" for arm, own in seeds.items())


def runs_of(study: str, scale: str) -> list[tuple[str, int]]:
    """Arm and seed of every run of a question; none of several stages where the scale has one."""
    arms, size = arms_of(study), SCALES[scale]
    if len(size.rates) == 1 and any((arm.stages or 1) > 1 for arm in arms):
        return []
    return [(arm.name, seed) for arm in arms for seed in arm.seeds(size)]
