"""A training YAML's stages, laid out without a run."""

from types import SimpleNamespace
from typing import Any

UNITS = ("ba", "tok", "sp")


def lay_out_stages(stages: Any, max_duration: str) -> Any:
    """The stage plan of a run that does not exist yet.

    Args:
        stages: as the algorithm holds them, of `parse_stages`.
        max_duration: as the YAML says it.

    Returns:
        A StagePlan, or None where the stages or the run are in epochs: their length is known
        when the data is.

    Raises:
        ValueError: the stages do not fill the run.
    """
    from composer.core import Time, TimeUnit, ensure_time

    from apex_composer.scheduler import plan_stages

    total = ensure_time(max_duration, TimeUnit.EPOCH)
    durations = [] if isinstance(stages, int) else [stage.duration for stage in stages]
    if TimeUnit.EPOCH in [time.unit for time in (total, *durations) if isinstance(time, Time)]:
        return None
    return plan_stages(stages, SimpleNamespace(max_duration=total, dataloader_len=None))
