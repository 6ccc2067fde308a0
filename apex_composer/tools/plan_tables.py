"""The result of `apex-composer plan` as tables."""

from dataclasses import fields

from rich.filesize import decimal
from rich.table import Column, Table

from apex_composer.callbacks.start_checks import (
    Checkpoints,
    averages,
    counted_as,
    moments,
    weight_bytes,
)
from apex_composer.settings import check_choice
from apex_composer.tools.model_size import Cost, count_shards, row_memory
from apex_composer.tools.plan import Plan

_KEPT = {
    "rows": ": copies in fp32, their gradients and two moments",
    "embeddings and head": ": gradients and two moments, in the weights' precision",
}


def peak_flops(gpu: str, precision: str) -> float:
    """Dense peak of a GPU, from Composer's table of NVIDIA's data sheets.

    Args:
        gpu: name in that table.
        precision: name as in the YAML.

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
        plan: result of `make_plan`.
        gpu: name of a GPU for the time.
        mfu: share of its peak that is assumed.
    """
    seconds, peak = None, plan.attempt(peak_flops, gpu, plan.config.get("precision", "amp_bf16"))
    if plan.step_flops is not None and peak is not None:
        seconds = plan.step_flops / plan.step_tokens / (plan.gpus * peak * mfu)
    tables = [_stages(plan, seconds, gpu, mfu)] if plan.stages else []
    if plan.parameters is not None:
        tables.append(_model(plan))
    if plan.cost is not None:
        tables.append(_selection(plan.cost))
    if plan.cost is not None and "apex" in plan.config["algorithms"]:
        tables.append(_cost(plan, plan.cost))
    return tables


def _stages(plan: Plan, seconds: float | None, gpu: str, mfu: float) -> Table:
    def amount(tokens: int) -> tuple[str, str]:
        hours = "-" if seconds is None else f"{tokens * seconds / 3600:.1f}"
        return _tokens(tokens), hours

    table = _numbers("stages", "stage", "ends at", "tokens", "learning rate", "operators", "hours")
    if seconds is not None:
        table.caption = (
            f"Time: {plan.gpus} x {gpu}, dense peak by Composer's table of NVIDIA's data sheets, "
            f"at an ASSUMED utilisation of {mfu:.0%} (--mfu); evaluation and saving come on top."
        )
    for number, stage in enumerate(plan.stages):
        rate = plan.config["scheduler"]["name"]
        if stage.learning_rates:
            rate = " → ".join(f"{value:g}" for value in stage.learning_rates)
        tokens, hours = amount(stage.tokens)
        operators = "yes" if stage.expansion else "no"
        table.add_row(str(number), stage.end, tokens, rate, operators, hours)
    table.add_section()
    tokens, hours = amount(plan.tokens)
    table.add_row("all", "", tokens, "", "", hours)
    return table


def _model(plan: Plan) -> Table:
    table, config = _pairs("run"), plan.config
    table.add_row("parameters", f"{plan.parameters:,}")
    batch = config["global_train_batch_size"]
    sequences = f"{batch} sequences of {config['max_seq_len']:,} tokens"
    step = f"{plan.step_tokens:,} tokens, {batch // plan.gpus} on each GPU"
    table.add_row("batch", f"{sequences} = {step}")
    told = f"not known, so no hours: {plan.no_flops}"
    if plan.step_flops is not None:
        squares = plan.step_flops - plan.step_tokens * plan.flops.per_token
        told = f"{plan.step_flops:.4g} a batch, {squares / plan.step_flops:.1%} of it attention's"
    table.add_row("FLOPs", told)
    shards = count_shards(config, plan.gpus)
    if plan.cost is None or plan.cost.share is None:
        trained = plan.parameters if plan.trained is None else plan.trained
        if trained < plan.parameters:
            share = f"{trained / plan.parameters:.3%}"
            table.add_row("trained", f"{trained:,} of {plan.parameters:,} parameters ({share})")
        copies = 1 + moments(config) + averages(config)
        width = weight_bytes(config)
        each = 4 if config["model"].get("peft_config") else width
        state = (width * plan.parameters + each * trained * copies) // shards
        kind = "fp32" if width == 4 else "weights of 16 bits"
        table.add_row(
            "weights, gradients, optimizer",
            f"{decimal(state)} on each GPU ({_way('FSDP', shards, plan.gpus)}, "
            f"{kind}{counted_as(config)}); activations come on top",
        )
    else:
        _rows(table, plan, shards)
    if plan.data_tokens and plan.tokens:
        epochs = f"read {plan.tokens / plan.data_tokens:.2f} times"
        table.add_row("training data", f"{_tokens(plan.data_tokens)} here, {epochs}")
    elif plan.data_tokens is None:
        table.add_row("training data", "not on this machine, so not counted")
    if plan.checkpoints is not None:
        table.add_row("checkpoints", f"{_describe(plan.checkpoints)} in {config['save_folder']}")
    return table


def _way(sharded: str, shards: int, gpus: int) -> str:
    if shards == 1:
        return "DDP"
    return sharded if shards == gpus else f"{sharded} over {shards} of {gpus}"


def _rows(table: Table, plan: Plan, shards: int) -> None:
    """What is trained, and the memory for it, where that is not the whole model."""
    table.add_row("rows only", plan.cost.share.describe())
    width = weight_bytes(plan.config)
    parts = row_memory(plan.cost, plan.parameters, width, plan.gpus, shards)
    for name, size in parts.items():
        if size:
            table.add_row(f"memory: {name}", f"{decimal(size)}{_KEPT.get(name, '')}")
    way = "one GPU" if plan.gpus == 1 else _way("FSDP2, FSDP_VERSION=2", shards, plan.gpus)
    total, own = sum(parts.values()) + plan.cost.memory, plan.cost.memory
    operators = f", with {decimal(own)} of operators" if own else ""
    table.add_row(
        "memory in all",
        f"{decimal(total)} on each GPU ({way}){operators}; activations come on top",
    )


def _describe(checkpoints: Checkpoints) -> str:
    kept = "as many as epochs make"
    if checkpoints.kept is not None:
        kept = f"{checkpoints.kept} at a time, {decimal(checkpoints.kept * checkpoints.size)}"
    saves = "" if checkpoints.saves is None else f"{checkpoints.saves} written, "
    return f"{decimal(checkpoints.size)} each, {saves}{kept}"


def _selection(cost: Cost) -> Table:
    title = "units selected on each side"
    table = _numbers(title, "kind", "groups", "units of a group", "selected")
    for kind in cost.kinds:
        selected = f"{kind.selected} ({kind.selected / kind.units:.1%})"
        selected = selected if kind.selected else "none: left alone"
        table.add_row(kind.kind, str(kind.groups), f"{kind.units:,}", selected)
    return table


def _cost(plan: Plan, cost: Cost) -> Table:
    of_all = cost.parameters / plan.parameters
    table = _pairs("what APEX adds")
    table.add_row("operators", f"{cost.sites} with {cost.parameters:,} parameters ({of_all:.2%})")
    table.add_row("memory", f"{decimal(cost.memory)} on each GPU, while a stage has any")
    if plan.added is not None:
        own = plan.step_flops / plan.step_tokens * plan.tokens
        parts = {field.name: getattr(plan.added, field.name) for field in fields(plan.added)}
        for name, flops in parts.items():
            told = f"{flops:.3g} of the run ({flops / own:.5%} of training's)"
            table.add_row(f"FLOPs: {name.replace('_', ' ')}", told)
        ratio = 1 + plan.added.total / own
        table.add_row("FLOPs in all", f"{ratio:.5f} times those of the run without these four")
    return table


def _numbers(title: str, *columns: str) -> Table:
    right = [Column(name, justify="right") for name in columns]
    return Table(*right, title=title, title_justify="left", caption_justify="left")


def _pairs(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False)


def _tokens(count: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,}"
