"""The steps of the job and the minutes that each is expected to take."""

from typing import Any

# Seconds on two idle cores with the YAML's own sizes: text, tokenizer and shards; a run's start
# and evaluation; a batch. Other sizes and machines take other times, which the text says.
DATA, RUN, BATCH = 45.0, 30.0, 0.3
STEPS = {
    "data": "text, tokenizer and shards",
    "base": "a small Llama, trained conventionally",
    "vanilla": "goes on from it, conventionally",
    "apex": "goes on from it with APEX, on the same batches",
}


def expected_minutes(template: Any) -> dict[str, float]:
    """Estimate the duration of every step on two CPU cores."""
    base, continued = template.variables.base_batches, template.variables.batches
    batches = {"base": base, "vanilla": continued, "apex": continued}
    return {"data": DATA / 60} | {run: (RUN + BATCH * n) / 60 for run, n in batches.items()}


def describe_steps(minutes: dict[str, float]) -> str:
    """Say what will happen and how long it may take."""
    lines = [
        f"  {number}. {step:8} {STEPS[step]:48} {show_minutes(minutes[step])}"
        for number, step in enumerate(STEPS, start=1)
    ]
    total = show_minutes(sum(minutes.values()))
    end = "in all on 2 CPU cores with nothing else to do; more on a busy machine, less on a GPU"
    return "\n".join([*lines, f"{total} {end}"])


def show_minutes(minutes: float) -> str:
    """Round up to whole minutes, in words."""
    return f"about {max(1, round(minutes + 0.25))} min"
