"""Runs as `read_runs` gives them, made of a few numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apex_composer.report.run import Curve, Run

TOKENS = 1000  # of a batch


def curve(values: Sequence[float], every: int = 10, first: int = 0) -> Curve:
    batches = [first + every * place for place in range(len(values))]
    return Curve(batches, [TOKENS * batch for batch in batches], list(values))


def make_run(
    name: str,
    validation: Mapping[str, Sequence[float]],
    *,
    seed: int = 17,
    tokens: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run with the settings of a plain one, and those that are given."""
    own = {"run_name": name, "seed": seed, "max_duration": "1ep", "optimizer.lr": 1e-4}
    fields: dict[str, Any] = {
        "name": name,
        "folder": Path(name) / f"seed{seed}",
        "settings": own | dict(settings or {}),
        "versions": {"torch": "2.7.0"},
        "device": "cpu, 2 threads",
        "data": {},
        "loss": curve([3.0, 2.0, 1.0], every=1),
        "validation": {domain: curve(values) for domain, values in validation.items()},
        "validation_tokens": tokens or {},
        "step_seconds": [0.1, 0.2, 0.3],
    }
    return Run(**(fields | changes))


APEX = {"algorithms.apex.threshold": 0.125}
