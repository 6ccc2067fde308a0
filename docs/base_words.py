"""The sentences of docs/results.md on a base: what it is, and what its units are worth."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from reproduce.bases import KINDS
from reproduce.comparisons import Record, Runs, difference, loss
from reproduce.summary import Study
from reproduce.tables import show

# What the bases are beside `mixture`, which was trained on all of the text that arms go on with.
BASES = {
    "scratch": "random weights, on which APEX's first stage is conventional (paper C.3)",
    "shift": "trained on code (github), and continued on documentation and packages",
    "context": "trained with windows of half the length",
    "superfluous": "`mixture`, trained on while an eighth of its units, those of lowest norm, are "
    "held at a hundredth of what they handed on: units that masking does not miss",
}


def start_in_words(study: Study) -> Iterator[str]:
    """What the base had come to, whether its learning rate rises again, and who ends below it."""
    one = study.records[0]
    if kind := BASES.get(one["settings"]["base"]):
        yield f"This base is {kind}."
    scale = one["scale"]
    start, read = loss(one, 0), tokens(one, one["base_batches"]) / 1e6
    text = "The base's"
    if read:
        text = f"The base had read {read:,.1f} M tokens{times_read(one, 'base')}; its"
    yield f"{text} loss is {start:.4f} nats."
    if one["base_batches"] and "base_end" in scale:
        ended, goes_on = scale["base_rate"] * scale["base_end"], scale["rate"] * scale["rates"][0]
        rises = ", which warms it up again" if goes_on > ended else ""
        yield f"Its learning rate had ended at {ended:g}; the arms go on at {goes_on:g}{rises}."
    ends = [fmean(loss(record, -1) for record in runs.records) for runs, _ in study.arms]
    above = sum(not end <= start for end in ends)
    text = f"The loss of {above} of {len(ends)} arms ends above the base's"
    if above == len(ends) > 1:
        text += ": none is better than what it went on from"
    yield f"{text}.\n"


def tokens(record: Record, batches: int) -> int:
    """That so many batches have."""
    scale = record["scale"]
    return batches * scale["batch"] * scale["sizes"]["length"]


def times_read(record: Record, split: str) -> str:
    """How often a run, or its base, has read its text; nothing where the text's size is not known.

    Args:
        record: of a run.
        split: `base` or `continued`.
    """
    sizes = record["texts_facts"].get("domains")
    if sizes is None:
        return ""
    kind = KINDS[record["settings"]["base"]]
    own = kind.domains if split == "base" else kind.continued
    size = sum(count[split] for domain, count in sizes.items() if own is None or domain in own)
    batches = record["base_batches"] if split == "base" else record["stage_ends"][-1]
    return f" ({tokens(record, batches) / size:.2g} times its text)"


def masked_in_words(records: Sequence[Record]) -> list[str]:
    """What a tenth of the base's units is worth, where a run has measured it: once for every seed,
    which decides the batches; nothing of random weights."""
    found = {
        own["seed"]: own["stages"][0]["masked"]
        for own in records
        if "masked" in own["stages"][0] and own["base_batches"]
    }
    if not found:
        return []
    cost = {
        which: f"{fmean(own[which] - own['whole'] for own in found.values()):.4f}"
        for which in ("lowest", "random", "top")
    }
    return [
        "Without the tenth of its units that has the lowest norms, this base's loss is "
        f"{cost['lowest']} nats higher, without a random tenth {cost['random']}, without the top "
        f"one {cost['top']} (paper, table 4, exact matches: 12.0 becomes 12.0, 11.5 and 0.0).\n"
    ]


def split_in_words(records: Sequence[Record]) -> Iterator[str]:
    """What dropping the weak units costs, and whether copies of the strong ones part from them."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        if "split_losses" in record["stages"][0]:
            arms.setdefault(record["arm"], []).append(record)
    for arm, own in arms.items():
        stages = list(zip(*(record["stages"] for record in own), strict=True))
        costs = [fmean(_cost(facts) for facts in stage) for stage in stages]
        alike = [fmean(facts["split_similarity"] for facts in stage) for stage in stages]
        yield (
            f"`{arm}`: as weak units become copies of strong ones at the beginning of each stage, "
            f"the loss rises by {', '.join(f'{cost:.4f}' for cost in costs)}; at the stages' ends "
            f"the cosine between the rows of both is {', '.join(f'{one:.5f}' for one in alike)} "
            "(1: copies still).\n"
        )


def _cost(facts: dict[str, Any]) -> float:
    return facts["split_losses"]["after"] - facts["split_losses"]["before"]


def shift_in_words(arms: Sequence[tuple[Runs, Runs | None]]) -> Iterator[str]:
    """Where arms read other text than their base: how far each differs on what it reads and on what
    it no longer reads."""
    lines = []
    for runs, baseline in arms:
        one = runs.records[0]
        read = KINDS[one["settings"]["base"]].continued
        if baseline is None or read is None:
            continue
        left = [domain for domain in one["losses"][0] if domain not in read]
        found = [show(difference(runs, baseline, runs.ends[-1], own)) for own in (read, left)]
        seeds = sorted(set(runs.by_seed) & set(baseline.by_seed))
        before, after = (
            fmean(loss(record, place, left) for record in baseline.records) for place in (0, -1)
        )
        lines.append(
            f"`{runs.arm}` minus `{baseline.arm}` at the end, on what both read: {found[0]}; on "
            f"{', '.join(left)}, which they forget ({before:.3f} becomes {after:.3f}): {found[1]} "
            f"(seeds {', '.join(map(str, seeds))})."
        )
    if lines:
        yield "\n".join([*lines, ""])
