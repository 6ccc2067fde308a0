"""The sentences of docs/results.md on what was run again with fresh seeds."""

from collections.abc import Iterator

from campaign_words import judge
from reproduce.comparisons import Runs, difference, is_conventional, training_difference
from reproduce.summary import Study
from reproduce.tables import show


def confirmed_in_words(study: Study) -> Iterator[str]:
    """What fresh seeds say of every arm that selects units: against plain training at its own
    rates, and at each other rate that was run with the same seeds; and which is lower than all."""
    if study.name != "confirm":
        return
    rivals = [other for other, _ in study.arms if is_conventional(other)]
    tried, winners = 0, []
    for runs, own in study.arms:
        if own is None or is_conventional(runs):
            continue
        against = [other for other in rivals if set(runs.by_seed) & set(other.by_seed)]
        yield "\n".join([*(_against(runs, other) for other in against), ""])
        highest = [difference(runs, other, runs.ends[-1]).high for other in against]
        tried += 1
        if all(high is not None and high < 0 for high in highest):
            winners.append(f"`{runs.arm}`")
    if tried:
        names = ", ".join(winners) or "None"
        yield f"{names} ends lower than plain training at every rate by more than chance.\n"


def _against(runs: Runs, rival: Runs) -> str:
    held_out = difference(runs, rival, runs.ends[-1])
    count = len(held_out.values)
    text = (
        f"With {count} fresh seed{'s' * (count > 1)} `{runs.arm}` minus `{rival.arm}` is "
        f"{show(held_out)} at the end ({judge(held_out)})"
    )
    trained = training_difference(runs, rival)
    if trained is not None:
        text += f" and {show(trained)} on the training text of the last stage ({judge(trained)})"
    return f"{text}."
