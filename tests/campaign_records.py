"""Results of a campaign, made of a few numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCALE = {
    "name": "cpu",
    "sizes": {"hidden": 8, "layers": 1, "length": 10},
    "batch": 4,
    "rate": 2e-3,
    "stage_batches": 100,
    "rates": [1.0, 0.4],
    "device": "cpu",
}
MACHINE = {
    "date": "2026-11-26T10:00:00+00:00",
    "device": "cpu, 2 threads",
    "versions": {"torch": "2.7.0", "triton": None},
    "commit": "0123456789abcdef",
}


def make_record(
    arm: str,
    seed: int,
    losses: Sequence[float],
    *,
    ends: Sequence[int] = (100, 200),
    spread: float = 0.5,
    study: str = "main",
    base: str = "b" * 64,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A run of two domains, whose losses are the given means minus and plus `spread`."""
    own = {
        "name": arm,
        "schedule": "stagewise",
        "rate": 1.0,
        "apex": None,
        "averaged": False,
        "keep_optimizer": True,
        "base": "mixture",
        "study": study,
        "variation": {},
        "stage_batches": 1.0,
        "stages": None,
    }
    record = {
        "arm": arm,
        "seed": seed,
        "study": study,
        "base": base,
        "base_batches": 12000,
        "texts": "t" * 64,
        "texts_facts": {"vocabulary": 300},
        "scale": SCALE,
        "settings": own | dict(settings or {}),
        "losses": [{"book": mean - spread, "code": mean + spread} for mean in losses],
        "stage_ends": list(ends),
        "stages": [{} for _ in ends],
        "training_losses": [3.5, 3.4],
        "seconds": 60.0,
        "machine": MACHINE,
        "command": "python benchmarks/reproduce/campaign.py cpu --study main",
        "date": "2026-11-26T11:00:00+00:00",
    }
    return record | changes


APEX = {"apex": {}}
CONSTANT = {"schedule": "constant"}


def small_campaign() -> list[dict[str, Any]]:
    """Three arms of three seeds, and one of two; numbers that can be checked by hand.

    APEX is 0.01, 0.02 and 0.03 above its baseline after stage 1, and 0.001, 0.002, 0.003 at the
    end; the constant rate 0.1 above it at the end with seeds 1 and 2.
    """
    found = []
    for seed in (1, 2, 3):
        chance = 0.1 * seed
        found.append(make_record("vanilla_stagewise", seed, [3.5, 3.0 + chance, 2.9 + chance]))
        losses = [3.5, 3.0 + chance + 0.01 * seed, 2.9 + chance + 0.001 * seed]
        facts = [{"relative_norm": 0.01 * seed}, {"relative_norm": 0.02 * seed}]
        found.append(make_record("apex_rank", seed, losses, settings=APEX, stages=facts))
        losses = [3.5, 3.0 + chance, 2.9 + chance]
        same = {"apex": {"expansion": False}}
        found.append(make_record("selection_only", seed, losses, settings=same))
        if seed < 3:
            losses = [3.5, 3.0 + chance, 3.0 + chance]
            constant = {"schedule": "constant", "averaged": True}
            found.append(make_record("vanilla_constant", seed, losses, settings=constant))
    return found


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
