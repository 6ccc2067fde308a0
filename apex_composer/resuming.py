"""What a run may change of the one whose checkpoint it goes on from."""

from collections.abc import Mapping, Sequence
from typing import Any

from apex_composer.settings import check_keys, check_not_negative

BRANCH_KEYS = ("parent", "sha256", "batch", "stage", "changed")
# The scores and operators of a running stage belong to these. The other settings act on later
# stages or on the learning rate only.
_SHAPING = ("threshold", "kv_heads", "expansion")

State = dict[str, Any]


def check_stages(saved: list[str], given: list[str], begun: int) -> None:
    """Refuse another plan for stages that were trained; later ones are free.

    Args:
        saved: `StagePlan.describe()` of the checkpoint's run.
        given: of this run.
        begun: how many stages have begun, finished ones included.

    Raises:
        ValueError: naming both plans.
    """
    if saved[:begun] != given[:begun]:
        raise ValueError(
            f"stages: the checkpoint has trained stages that end at {saved[:begun]} (the last one "
            f"perhaps in part), this run says {given}. Stages that have begun cannot be changed: "
            "list their durations as they were, then append, change or leave out later ones. To "
            "end the running stage here instead, use `apex-composer branch`"
        )


def check_branch(branch: Any) -> dict[str, Any] | None:
    """The `branch` setting, which `apex-composer branch` writes, or None.

    Raises:
        TypeError: for unknown keys.
        ValueError: for anything but a complete mapping of what belongs there.
    """
    if branch is None:
        return None
    if isinstance(branch, Mapping):
        check_keys("branch", branch, BRANCH_KEYS)
    if not isinstance(branch, Mapping) or set(branch) != set(BRANCH_KEYS):
        raise ValueError(
            f"branch: got {branch!r}, allowed: a mapping of {', '.join(BRANCH_KEYS)}, as "
            "`apex-composer branch` writes it into a YAML"
        )
    for key in ("batch", "stage"):
        check_not_negative(f"branch: {key}", branch[key])
    pairs = branch["changed"]
    if not isinstance(pairs, Mapping) or any(
        isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2
        for pair in pairs.values()
    ):
        raise ValueError(f"branch: changed: got {pairs!r}, allowed: {{setting: [before, after]}}")
    return {**branch, "changed": {key: list(pair) for key, pair in pairs.items()}}


def trace(
    branch: dict[str, Any] | None, loaded: State | None, batch: int
) -> tuple[list[dict[str, Any]], bool]:
    """Where a run comes from.

    Args:
        branch: of `check_branch`.
        loaded: the algorithm's state in the checkpoint, or None.
        batch: where the run stands.

    Returns:
        All branches from the first parent on, and whether the run leaves its parent just now. A
        branch that was killed and resumed is in its own checkpoint's lineage already.

    Raises:
        ValueError: the branch was made from another checkpoint.
    """
    lineage = (loaded or {}).get("lineage", [])
    if branch is None or branch in lineage:
        return lineage, False
    if loaded is None or batch != branch["batch"]:
        found = f"batch {batch}" + ("" if loaded is not None else ", without a state of apex")
        raise ValueError(
            f"branch: this run branches off at batch {branch['batch']} of {branch['parent']}, but "
            f"starts at {found}: set `load_path` to that checkpoint, or remove `branch`"
        )
    return [*lineage, branch], True


def keeps_the_stage(loaded: State, settings: State, targets: list[str], plan: list[str]) -> bool:
    """Whether the operators and scores of a checkpoint's running stage fit a branch's settings.

    Args:
        loaded: the algorithm's state in the checkpoint.
        settings: the Expander's, as the branch has them.
        targets: of the branch.
        plan: `StagePlan.describe()` of the branch.
    """
    begun = loaded["stage"] + 1
    return (
        all(loaded["settings"][name] == settings[name] for name in _SHAPING)
        and loaded["targets"] == targets
        and loaded["stages"][:begun] == plan[:begun]
    )


def trained_records(history: list[State], batch: int) -> list[State]:
    """The stages that were trained for at least a batch before the given one."""
    return [record for record in history if record["start_batch"] < batch]
