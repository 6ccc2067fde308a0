"""The tables that `observe` prints: deviations, masking, ranks, changes."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from apex_composer.observe.ranks import rank_changes


def make_tables(found: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Deviations and ranks of all models side by side, and each model's masking table."""
    tables = []
    if any("activations" in one for one in found.values()):
        tables.append(_deviations(found))
    tables += [_masking(name, one["masking"]) for name, one in found.items() if "masking" in one]
    if any("ranks" in one for one in found.values()):
        tables.append(_ranks({name: one["ranks"]["weights"] for name, one in found.items()}))
    tables += [_changes(name, one["delta"]) for name, one in found.items() if "delta" in one]
    return tables


def _changes(name: str, delta: Mapping[str, Any]) -> Table:
    """Relative changes of the expanded weights and of their units' rows, means over the layers."""
    title = f"what training changed: {name} against {delta['base']}, % of the base"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("projection")
    kinds = ["relative", "advantageous", "disadvantageous", "unselected"]
    kinds = kinds if delta["selected"] else kinds[:1]
    for kind in kinds:
        table.add_column("whole" if kind == "relative" else kind, justify="right")
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for entry in delta["weights"].values():
        if "energy" in entry:
            parts.setdefault(entry["projection"], []).append(entry)
    for projection, entries in parts.items():
        known = [[e[f"{k}_change"] for e in entries if e[f"{k}_change"] is not None] for k in kinds]
        table.add_row(escape(projection), *(f"{100 * fmean(k):.3g}" if k else "" for k in known))
    return table


def _ranks(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Mean over the layers, and what it has grown by since the first model."""
    table = Table(title="entropy-based effective rank, mean of the layers", title_justify="left")
    table.add_column("projection")
    base = next(iter(found.values()))
    for name in found:
        head = "rank" if len(found) == 1 else escape(name)
        table.add_column(head, justify="right", overflow="fold")
    for projection in dict.fromkeys(entry["projection"] for entry in base.values()):
        cells = []
        for place, own in enumerate(found.values()):
            names = [name for name, one in own.items() if one["projection"] == projection]
            cell = f"{fmean(own[name]['entropy_rank'] for name in names):.2f}" if names else ""
            grown = rank_changes(own, base)
            if place and names and all(name in grown for name in names):
                cell += f" ({fmean(grown[name]['entropy_rank'] for name in names):+.2f})"
            cells.append(cell)
        table.add_row(escape(projection), *cells)  # Wqkv[keys] is no markup
    return table


def _deviations(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="deviation of the units' mean norms", title_justify="left")
    table.add_column("layer", justify="right")
    values = {
        (group["unit"], name, group["layer"]): group["std"]
        for name, one in found.items()
        for group in one["activations"]["groups"].values()
    }
    columns = [
        (unit, name)
        for unit in ("head", "channel")
        for name in found
        if any((unit, name) == key[:2] for key in values)
    ]
    for unit, name in columns:
        head = f"{unit}s" if len(found) == 1 else escape(f"{unit}s {name}")
        table.add_column(head, justify="right", overflow="fold")
    for layer in sorted({layer for *_, layer in values}):
        cells = [values.get((*column, layer)) for column in columns]
        table.add_row(str(layer), *("" if cell is None else f"{cell:.4g}" for cell in cells))
    return table


def _masking(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=escape(f"masking {name}"), title_justify="left")
    answered = rows[0]["exact_match"] is not None
    heads = ["masked", "units", "loss", "change", "perplexity"]
    for head in heads + ["exact match"] * answered:
        justify = "left" if head == "masked" else "right"
        table.add_column(head, justify=justify, no_wrap=head in ("masked", "change"))
    for row in rows:
        whole, error = row["which"] == "none", row["loss_change_error"]
        change = f"{row['loss_change']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
        cells = [
            "nothing" if whole else f"{row['which']} {row['share']:g}",
            str(sum(row.get(unit, 0) for unit in ("heads", "channels"))),
            f"{row['loss']:.4f}",
            "" if whole else change,
            f"{row['perplexity']:.4g}",
        ]
        table.add_row(*cells, *([f"{row['exact_match']:.1%}"] if answered else []))
    return table
