"""The plan of a run as tables."""

from typing import Any

from rich.table import Table

from apex_composer.callbacks.disk import GIGABYTE, moments
from apex_composer.settings import check_choice
from apex_composer.tools.plan import Plan

MEGABYTE = 1_000_000


def peak_flops(gpu: str, precision: str) -> float:
    """Dense peak of a GPU, from Composer's table of NVIDIA's data sheets.

    Args:
        gpu: a name of that table.
        precision: as in the YAML.

    Raises:
        ValueError: the table does not have it.
    """
    from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS

    check_choice("--gpu", gpu, sorted(GPU_AVAILABLE_FLOPS))
    check_choice(f"precision (on {gpu})", precision, sorted(GPU_AVAILABLE_FLOPS[gpu]))
    return GPU_AVAILABLE_FLOPS[gpu][precision]


def make_plan_tables(plan: Plan, gpu: str, mfu: float) -> list[Table]:
    """Stages, model, cost of APEX, checkpoints; what is not known is left out.

    Args:
        plan: of `make_plan`.
        gpu: name of a GPU for the time.
        mfu: share of its peak that is assumed.
    """
    seconds, peak = None, plan.attempt(peak_flops, gpu, plan.config.get("precision", "amp_bf16"))
    if plan.flops_per_token is not None and peak is not None:
        seconds = plan.flops_per_token / (plan.gpus * peak * mfu)
    tables = [_stages(plan, seconds, gpu, mfu)] if plan.stages else []
    if plan.parameters is not None:
        tables.append(_model(plan))
    if plan.groups:
        tables.append(_selection(plan))
    if plan.cost is not None:
        tables.append(_cost(plan))
    return tables


def _stages(plan: Plan, seconds: float | None, gpu: str, mfu: float) -> Table:
    caption = None
    if seconds is not None:
        caption = (
            f"Time: {plan.gpus} x {gpu}, dense peak by Composer's table of NVIDIA's data sheets, "
            f"at an ASSUMED utilisation of {mfu:.0%} (--mfu); evaluation and saving come on top."
        )
    table = Table(title="stages", caption=caption, title_justify="left", caption_justify="left")
    for column in ("stage", "ends at", "tokens", "learning rate", "operators", "hours"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(plan.stages):
        rate = plan.config["scheduler"]["name"]
        if stage.learning_rate is not None:
            rate = f"{stage.learning_rate:g}"
        hours = "-" if seconds is None else f"{stage.tokens * seconds / 3600:.1f}"
        operators = "yes" if stage.expansion else "no"
        table.add_row(str(number), stage.end, _tokens(stage.tokens), rate, operators, hours)
    total = "-" if seconds is None else f"{plan.tokens * seconds / 3600:.1f}"
    table.add_section()
    table.add_row("all", "", _tokens(plan.tokens), "", "", total)
    return table


def _model(plan: Plan) -> Table:
    table = _pairs("run")
    config = plan.config
    table.add_row("parameters", f"{plan.parameters:,}")
    batch = config["global_train_batch_size"]
    step = batch * config["max_seq_len"]
    sequences = f"{batch} sequences of {config['max_seq_len']:,} tokens"
    table.add_row("batch", f"{sequences} = {step:,} tokens, {batch // plan.gpus} on each GPU")
    state = plan.parameters * 4 * (2 + moments(config["optimizer"]["name"]))
    sharded = config.get("fsdp_config") is not None and plan.gpus > 1
    share = state / plan.gpus if sharded else state
    table.add_row(
        "weights, gradients, optimizer",
        f"{share / GIGABYTE:.1f} GB on each GPU ({'FSDP' if sharded else 'DDP'}, fp32); "
        "activations come on top",
    )
    if plan.data_tokens and plan.tokens:
        epochs = f"read {plan.tokens / plan.data_tokens:.2f} times"
        table.add_row("training data", f"{_tokens(plan.data_tokens)} here, {epochs}")
    elif plan.data_tokens is None:
        table.add_row("training data", "not on this machine, so not counted")
    if plan.checkpoints is not None:
        table.add_row("checkpoints", _describe_checkpoints(plan.checkpoints))
    return table


def _describe_checkpoints(checkpoints: Any) -> str:
    size = f"{checkpoints.size / GIGABYTE:.2f} GB each"
    kept = "as many as epochs make"
    if checkpoints.kept is not None:
        total = checkpoints.kept * checkpoints.size / GIGABYTE
        kept = f"{checkpoints.kept} at a time, {total:.1f} GB"
    saves = "" if checkpoints.saves is None else f"{checkpoints.saves} written, "
    return f"{size}, {saves}{kept} in {checkpoints.folder}"


def _selection(plan: Plan) -> Table:
    table = Table(title="units selected on each side", title_justify="left")
    for column in ("kind", "groups", "units of a group", "selected"):
        table.add_column(column, justify="right")
    for kind in plan.groups:
        selected = f"{kind.selected} ({kind.selected / kind.units:.1%})"
        selected = selected if kind.selected else "none: left alone"
        table.add_row(kind.kind, str(kind.groups), f"{kind.units:,}", selected)
    return table


def _cost(plan: Plan) -> Table:
    cost, config = plan.cost, plan.config
    step = config["global_train_batch_size"] * config["max_seq_len"]
    of_all = cost.parameters / plan.parameters
    # Every GPU does the operators' work of a step, the norms only of its own tokens.
    added = cost.flops_per_step * plan.gpus + cost.flops_per_token * step
    table = _pairs("what APEX adds")
    table.add_row("operators", f"{cost.sites} with {cost.parameters:,} parameters ({of_all:.2%})")
    table.add_row("memory", f"{cost.memory / MEGABYTE:,.0f} MB on each GPU, while a stage has any")
    table.add_row("arithmetic", f"{added / (plan.flops_per_token * step):.3%} of a step's FLOPs")
    return table


def _pairs(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False)


def _tokens(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,.0f}"
