"""Tables of what a checkpoint knows about its run."""

from collections import Counter
from statistics import fmean

from rich.markup import escape
from rich.table import Column, Table

from apex_composer.tools.checkpoint_file import CheckpointFile


def make_tables(checkpoint: CheckpointFile) -> list[Table]:
    """Where the run stands, its settings, its stages and where it comes from."""
    tables = [_summary(checkpoint), _settings(checkpoint), _stages(checkpoint)]
    return [*tables, *([_lineage(checkpoint)] if checkpoint.apex.get("lineage") else [])]


def describe_position(checkpoint: CheckpointFile) -> str:
    """In words: the running stage and how much of it is done, or that all are over."""
    apex, plan = checkpoint.apex, checkpoint.plan
    count = len(plan.ends)
    if checkpoint.ended == count:
        return f"all {count} stages are over"
    end, unit = plan.ends[apex["stage"]], plan.unit
    operators = f"{len(apex['factors'])} operators" if apex["factors"] else "no operators"
    return f"stage {apex['stage']} (of 0 to {count - 1}), up to {end:,}{unit}, {operators}"


def _summary(checkpoint: CheckpointFile) -> Table:
    table = Table(title=str(checkpoint.path), show_header=False, title_justify="left")
    clock = ", ".join(f"{name} {value:,}" for name, value in checkpoint.clock.items())
    table.add_row("trained", clock)
    table.add_row("stage", describe_position(checkpoint))
    factors = sum(f.numel() for pair in checkpoint.apex["factors"].values() for f in pair)
    table.add_row("operator parameters", f"{factors:,}")
    rows = [part for own in checkpoint.apex.get("rows", {}).values() for part in own["rows"]]
    if rows:
        count = sum(part.numel() for part in rows)
        table.add_row("parameters in trained rows", f"{count:,} in {rows[0].dtype}")
    samples = max((entry[2] for entry in checkpoint.apex["scores"].values()), default=0)
    table.add_row("scores for the next stage", f"from {samples:,} samples")
    return table


def _settings(checkpoint: CheckpointFile) -> Table:
    table = Table(title="settings", show_header=False, title_justify="left")
    for name, value in checkpoint.apex["settings"].items():
        table.add_row(name, str(value))
    table.add_row("targets", ", ".join(checkpoint.apex["targets"]))
    table.add_row("stages", ", ".join(checkpoint.plan.describe()))
    return table


def _stages(checkpoint: CheckpointFile) -> Table:
    names = ("stage", "operators", "from batch", "selected on", "overlap")
    columns = [Column(name, justify="right") for name in names]
    table = Table(*columns, "expanded units", title="stages so far", title_justify="left")
    for record in checkpoint.apex["history"]:
        overlaps = [value for pair in record["overlap"].values() for value in pair]
        kinds: Counter[str] = Counter()
        for group, units in record["advantageous"].items():
            kinds[group.rsplit(".", 1)[-1]] += len(units)
        table.add_row(
            str(record["stage"]),
            "yes" if record["expansion"] else "no",
            f"{record.get('start_batch', 0):,}",
            f"{record['samples']:,} samples",
            f"{fmean(overlaps):.2f}" if overlaps else "-",
            ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()),
        )
    return table


def _lineage(checkpoint: CheckpointFile) -> Table:
    names = ("parent", "sha256", "batch", "stage", "changed")
    columns = [Column(name, overflow="fold") for name in names]
    table = Table(*columns, title="lineage, oldest first", title_justify="left")
    for point in checkpoint.apex["lineage"]:
        changed = "\n".join(f"{k}: {old} -> {new}" for k, (old, new) in point["changed"].items())
        place = (str(point["batch"]), str(point["stage"]))
        table.add_row(escape(point["parent"]), point["sha256"][:12], *place, escape(changed))
    return table
