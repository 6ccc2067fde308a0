"""The table that the job prints."""

from typing import Any

from rich.table import Table


def make_table(summary: dict[str, Any]) -> Table:
    """Show the perplexities of the three models per domain and in total.

    Args:
        summary: content of `summary.json`.
    """
    table = Table(title="validation perplexity (lower is better)", caption=_caption(summary))
    table.add_column("domain")
    for name in ("tokens", "base", "vanilla", "APEX", "APEX - vanilla"):
        table.add_column(name, justify="right")
    tokens = summary["data"]["predicted_validation_tokens"]
    runs = [summary[f"{run}_ppl"] for run in ("base", "vanilla", "apex")]
    for domain, count in tokens.items():
        table.add_row(*_row(domain, count, [run["domains"][domain] for run in runs]))
    for domain, reason in summary["data"]["not_evaluated"].items():
        table.add_row(domain, "0", *["-"] * 3, reason)
    table.add_section()
    total = sum(tokens.values())
    table.add_row(*_row("total", total, [run["total"] for run in runs]), style="bold")
    return table


def _caption(summary: dict[str, Any]) -> str:
    ratio, times = summary["step_time_ratio"], summary["step_seconds"]
    caption = (
        f"median step: vanilla {times['vanilla']['median'] * 1000:.1f} ms, "
        f"APEX {times['apex']['median'] * 1000:.1f} ms, ratio {ratio:.3f}"
    )
    if "training only" in summary["data"]["not_evaluated"].values():
        caption += "\ntraining only: no two documents of which one fills a sequence"
    if summary["data"]["held_out_are_sections"]:
        caption += "\nNo domain has two documents that fill a sequence: what was held out are "
        caption += "sections of the same documents that were trained on."
    return caption


def _row(name: str, tokens: int, values: list[float]) -> list[str]:
    _, vanilla, apex = values
    return [name, f"{tokens:,}", *(f"{value:.3f}" for value in values), f"{apex - vanilla:+.3f}"]
