"""What a run may change of the one whose checkpoint it goes on from.

Here: stages, settings and branches. `resumed_rates.py` has the rates of stages that were trained,
`optimizer_settings.py` the optimizer.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apex_composer.settings import check_keys, check_not_negative, check_same
from apex_composer.trainer.stage_plan import StagePlan

if TYPE_CHECKING:
    from composer.core import Timestamp

    from apex_composer.expander import Expander

BRANCH_KEYS = ("parent", "sha256", "batch", "stage", "changed")
# The scores and operators of a running stage belong to these. The other settings act on later
# stages or on the learning rate only.
_SHAPING = ("threshold", "kv_heads", "expansion", "trainable", "trainable_share")
# By how much the main optimizer trains as it is: rows only, embeddings and head too, everything.
_WHOLE = {"disadvantageous": 0, "selected": 0, "half": 1, "all": 2}

State = dict[str, Any]


def check_stages(saved: StagePlan, given: StagePlan, begun: int) -> None:
    """Refuse another plan for stages that were trained; later ones are free.

    Args:
        saved: the plan of the checkpoint's run, or of the fit before.
        given: the plan of this run.
        begun: how many stages have begun, finished ones included.

    Raises:
        ValueError: naming both plans.
    """
    if begun and saved.first(begun) != given.first(begun):
        raise ValueError(
            f"stages: the checkpoint has trained stages that end at {saved.describe()[:begun]} "
            f"(the last one perhaps in part), this run says {given.describe()}. Stages that have "
            "begun cannot be changed: list their durations as they were, then append, change or "
            "leave out later ones. To end the running stage here instead, use `apex-composer "
            "branch`"
        )


def check_clock(history: list[State], batch: int) -> None:
    """Refuse to go on with a stage that begins later than the run stands.

    Args:
        history: records of the stages so far.
        batch: where the run stands.

    Raises:
        ValueError: naming both batches.
    """
    begin = history[-1].get("start_batch", 0)
    if batch < begin:
        raise ValueError(
            f"timestamp: the run stands at batch {batch}, but its stage {history[-1]['stage']} "
            f"began at batch {begin}: load the checkpoint with its timestamp, or begin anew from "
            "batch 0 with fit(reset_time=True)"
        )


def check_further(begun: StagePlan, given: StagePlan, history: list[State], batch: int) -> None:
    """Refuse a further fit of the same trainer that cannot go on with the running stage.

    Args:
        begun: the plan of the fit before.
        given: the plan of this fit.
        history: records of the stages so far.
        batch: where the run stands.

    Raises:
        ValueError: for other stages, or a clock behind the stage's start.
    """
    if begun != given:
        raise ValueError(
            f"stages: this run was laid out as {begun.describe()}, the further fit() makes it "
            f"{given.describe()}: keep max_duration, start a new Trainer, or begin anew with "
            "fit(reset_time=True)"
        )
    check_clock(history, batch)


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
    for key in ("parent", "sha256"):
        if not isinstance(branch[key], str):
            raise ValueError(f"branch: {key}: got {branch[key]!r}, allowed: a string")
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
        branch: what `check_branch` returns.
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


def saved_settings(loaded: State) -> dict[str, Any]:
    """The settings in a checkpoint; before there was a choice of what is trained, it was all."""
    return {"trainable": "all", "trainable_share": None, **loaded["settings"]}


def check_trained(loaded: State | None, trainable: str) -> None:
    """Refuse, before an optimizer's state is loaded, to train as it is what has no moments there.

    Args:
        loaded: the algorithm's state in the checkpoint, or None.
        trainable: the run's.

    Raises:
        ValueError: naming both modes.
    """
    saved = trainable if loaded is None else saved_settings(loaded)["trainable"]
    if _WHOLE[trainable] > _WHOLE[saved]:
        raise ValueError(
            f"trainable: the checkpoint was trained with {saved!r}, this run says {trainable!r}, "
            "and the optimizer in the checkpoint has no moments of what it would have to train. "
            f"Set it back to {saved!r} to resume, or start a new run from the checkpoint's weights "
            "(load_weights_only: true)"
        )


def changeable(apex: Any) -> State:
    """The settings of an algorithm that a resumed run may change; a checkpoint keeps them too."""
    return {
        "operator_lr_scale": apex.operator_lr_scale or 1.0,
        "assessment.interval": apex.interval,
    }


def tell_changed(loaded: State | None, apex: Any) -> None:
    """Warn of what holds from here on in place of the checkpoint's, within a stage too.

    Args:
        loaded: the algorithm's state in the checkpoint, or None.
        apex: the algorithm.
    """
    saved = (loaded or {}).get("changeable", {})
    lines = [
        f"{name}: the checkpoint's run had {saved[name]}, this run says {now}, from here on"
        for name, now in changeable(apex).items()
        if saved.get(name, now) != now
    ]
    if lines:
        warnings.warn("; ".join(lines), stacklevel=2)


def keeps_the_stage(
    loaded: State, settings: State, targets: list[str], plan: StagePlan, now: int
) -> bool:
    """Whether the operators and scores of a checkpoint's running stage fit a branch's settings.

    The running stage may end earlier or later than it would have: what was trained of it does not
    depend on its end.

    Args:
        loaded: the algorithm's state in the checkpoint.
        settings: the Expander's, as the branch has them.
        targets: the branch's.
        plan: the branch's.
        now: where the run stands, in the plan's unit.
    """
    saved, stage = StagePlan.from_state(loaded["stages"]), loaded["stage"]
    same = saved.first(stage + 1) == plan.first(stage + 1)
    if not same and len(plan.ends) > stage:
        ahead = now < min(saved.ends[stage], plan.ends[stage])
        both = saved.expansion[stage] == plan.expansion[stage]
        same = ahead and both and saved.first(stage) == plan.first(stage)
    return (
        all(saved_settings(loaded)[name] == settings[name] for name in _SHAPING)
        and loaded["targets"] == targets
        and same
    )


def restore(
    expander: "Expander",
    loaded: State | None,
    plan: StagePlan,
    targets: Sequence[str],
    timestamp: "Timestamp",
    branching: bool,
) -> bool:
    """Go on from a checkpoint, where there is one with a stage to go on with.

    Args:
        expander: the run's, new.
        loaded: the algorithm's state in the checkpoint, or None.
        plan: the run's.
        targets: the run's.
        timestamp: where the run stands.
        branching: whether the run leaves its checkpoint's settings just now.

    Returns:
        Whether the expander is in the middle of its stage, which otherwise has to begin.

    Raises:
        ValueError: for what may not differ from the checkpoint.
    """
    batch, now = timestamp.batch.value, timestamp.get(plan.unit).value
    if loaded is None:
        if batch > 0:
            warnings.warn(
                f"the checkpoint at batch {batch} was loaded without the state of apex. Its "
                "weights are usable as they are (operators are part of them); the current stage "
                "starts anew with a new assessment and new operators",
                stacklevel=2,
            )
        return False
    settings, targets = expander.settings(), list(targets)
    assessing = loaded["stage"] < 0  # saved before the run's stage had begun
    if assessing or (branching and not keeps_the_stage(loaded, settings, targets, plan, now)):
        # Without the stages that were set up, but not trained for a batch.
        trained = [record for record in loaded["history"] if record["start_batch"] < batch]
        expander.history = trained
        if expander.training is not None:
            expander.training.take_over(loaded.get("rows", {}))
        return False
    if branching:
        loaded = {**loaded, "settings": settings}
    else:
        check_stages(StagePlan.from_state(loaded["stages"]), plan, loaded["stage"] + 1)
    check_clock(loaded["history"], batch)
    check_same("targets", loaded["targets"], targets)
    expander.load_state_dict(loaded)
    return True


def warn_anew() -> None:
    """Say that the clock of a run whose stages had begun stands at 0."""
    warnings.warn(
        "the run's clock stands at 0 although apex has begun before (reset_time, a checkpoint "
        "without its timestamp, or a first batch that failed): the run begins anew, with a first "
        "assessment and stage 0. What was trained is part of the weights",
        stacklevel=2,
    )
