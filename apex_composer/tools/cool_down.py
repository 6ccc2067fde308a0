"""A cool-down from a checkpoint: the settings whose learning rate decays from there to the end."""

import math
from fractions import Fraction
from typing import Any

from apex_composer.callbacks.start_checks import unit_tokens
from apex_composer.tools.checkpoint_file import CheckpointFile

# What of the schedule a cool-down leaves to the user.
CHOSEN = ("scheduler.decay", "scheduler.alpha_f")


def cool_down(parent: CheckpointFile, config: dict[str, Any], cooldown: str) -> dict[str, Any]:
    """The settings of a run that goes on from a checkpoint with a decaying learning rate.

    Args:
        parent: the checkpoint.
        config: `max_duration` of its run, with `max_seq_len` and `global_train_batch_size` where
            the cool-down is in another unit.
        cooldown: length, a Composer time string; `dur` is a share of the parent's max_duration.

    Returns:
        By their places in the YAML: `max_duration`, `scheduler`, and the stages of a run with APEX.

    Raises:
        ValueError: the length is not exact in the unit of max_duration, or nothing is there to
            cool down.
    """
    length, unit = _length(parent, config, cooldown)
    end = parent.now(unit) + length
    settings: dict[str, Any] = {
        "max_duration": f"{end}{unit}",
        "scheduler": {"name": "wsd", "t_decay": f"{length}{unit}", "alpha_i": multiplier(parent)},
    }
    if parent.apex:
        settings["algorithms.apex.stages"] = _stages(parent, end, unit)
    return settings


def multiplier(parent: CheckpointFile) -> float:
    """What the base learning rates are multiplied by in the checkpoint's next batch.

    It is the shortest number that gives the same rates bit for bit, where there is one.

    Raises:
        ValueError: there is no rate, it is 0, or the param groups do not have one in common.
    """
    path, shares = parent.path, [rate / base for rate, base in parent.rates if base]
    if not shares:
        raise ValueError(
            f"{path} holds no state of an optimizer (save_ignore_keys), so its learning rate is "
            "not known. Needed: a whole checkpoint"
        )
    share = shares[0]
    if not all(math.isclose(other, share, rel_tol=1e-6) for other in shares):
        raise ValueError(
            f"{path}: the param groups have {shares} of their base learning rates, allowed: one "
            "share for all, as schedulers make it"
        )
    if share <= 0:
        raise ValueError(
            f"{path}: the learning rate is {parent.rates[0][0]:g} there, and nothing can decay "
            "from it. Give a checkpoint of a time at which the run was training"
        )
    shorter = (float(f"{share:.{digits}g}") for digits in range(1, 18))
    near = (math.nextafter(share, towards) for towards in (0, math.inf))
    exact = (
        number
        for number in (*shorter, *near)
        if all(base * number == rate for rate, base in parent.rates)
    )
    return next(exact, share)


def _stages(parent: CheckpointFile, end: int, unit: str) -> list[Any]:
    """Those that are over, then the running one to the new end; after the last, one more."""
    plan = parent.plan
    if plan.unit != unit:
        raise ValueError(
            f"max_duration: the YAML has it in {unit}, but the stages of {parent.path} are in "
            f"{plan.unit}. Give the parent run's own YAML"
        )
    over = parent.ended
    starts = [0, *plan.ends[:over]]
    lengths = [b - a for a, b in zip(starts, [*starts[1:], end], strict=True)]
    # One more has operators if the last one had.
    expansion = [*plan.expansion, plan.expansion[-1]]
    return [
        f"{length}{unit}" if operators else {"duration": f"{length}{unit}", "expansion": False}
        for length, operators in zip(lengths, expansion, strict=False)
    ]


def _length(parent: CheckpointFile, config: dict[str, Any], cooldown: str) -> tuple[int, str]:
    """The cool-down in the unit of max_duration; for a run in epochs, in batches."""
    from composer.core import TimeUnit, ensure_time

    from apex_composer.trainer.stages import parse_duration

    given = parse_duration("--cooldown", cooldown)
    total = ensure_time(config["max_duration"], TimeUnit.EPOCH)
    unit = "ba" if total.unit == TimeUnit.EPOCH else total.unit.value
    if unit not in ("ba", "sp", "tok"):
        raise ValueError(
            f"max_duration: got {config['max_duration']}, allowed with --cooldown: ba, sp, tok, ep"
        )
    share = given.unit == TimeUnit.DURATION
    length, own = Fraction(str(given.value)), given.unit.value
    if share:
        length, own = length * total.value, total.unit.value
    if own == "ep":
        length, own = length * _epoch_batches(parent, cooldown), "ba"
    if own != unit:
        length *= _units(parent, config, cooldown, own, unit)
    if length.denominator != 1:
        raise ValueError(
            f"--cooldown: got {cooldown}, which is {float(length):g}{unit}, but max_duration is "
            f"{total}: give it as a whole number of {unit}"
        )
    return int(length), unit


def _epoch_batches(parent: CheckpointFile, cooldown: str) -> int:
    if parent.epoch_batches is None:
        raise ValueError(
            f"--cooldown: got {cooldown}, but {parent.path} was saved in the first epoch and does "
            "not tell how many batches an epoch has: give it in ba"
        )
    return parent.epoch_batches


def _units(
    parent: CheckpointFile, config: dict[str, Any], cooldown: str, own: str, unit: str
) -> Fraction:
    """How much of a unit is one of another, where all batches so far were full ones."""
    try:
        tokens = unit_tokens(config)
    except KeyError as error:
        raise ValueError(
            f"--cooldown: got {cooldown}, but max_duration is in {unit} and the YAML has no "
            f"{error.args[0]} to convert it: give it in {unit}"
        ) from error
    for name in (own, unit):
        full = parent.clock["batch"] * tokens["ba"]
        if parent.now(name) * tokens[name] != full:
            raise ValueError(
                f"--cooldown: got {cooldown}, but max_duration is in {unit}, and of this run not "
                f"all batches have {tokens['ba'] // tokens[name]}{name} (after "
                f"{parent.clock['batch']} batches it stands at {parent.now(name)}{name}): give it "
                f"in {unit}"
            )
    return Fraction(tokens[own], tokens[unit])
