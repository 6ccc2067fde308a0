"""The results as tables: in the paper's layout with the paper's rows, and every number."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from apex_composer.evaluate.perplexity import Loss
from apex_composer.evaluate.preset import PaperRow, Preset, PresetTask

Rows = Sequence[Sequence[str]]
PERPLEXITY = "perplexity"  # its place in a model's record, and of LAMBADA a metric
NOTHING = "–"
# Of a model's description, what is chosen for an evaluation.
_ON = ("dtype", "device")


def measured(metrics: Mapping[str, Any], name: str) -> str | None:
    """The metric of a task that a name means, with or without the harness's filter."""
    return next((full for full in metrics if name in (full, full.partition(",")[0])), None)


def short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Names for the tables: the last part of each path, where no two models share it."""
    last = {source: Path(source).name for source in results["models"]}
    shared = len(set(last.values())) < len(last)
    return {source: source for source in last} if shared else last


def paper_table(results: Mapping[str, Any], preset: Preset, tasks: Sequence[PresetTask]) -> Rows:
    """A row for each model and each of the paper's; the first row names the columns.

    Args:
        results: content of `eval.json`.
        preset: has the paper's numbers.
        tasks: those of the columns.
    """
    rows = [["model", "PPL", *(f"{task.column} {task.shots}-shot" for task in tasks)]]
    rows[0].append("average")
    names = short_names(results)
    for source, record in results["models"].items():
        perplexity = record.get(PERPLEXITY)
        total = f"{Loss(**perplexity['total']).perplexity:.2f}" if perplexity else NOTHING
        cells = [_cell(record, task) for task in tasks]
        rows.append([names[source], total, *cells, _average(record, preset, tasks)])
    columns = (PERPLEXITY, *(task.column for task in tasks))
    for row in preset.rows:
        numbers = [paper_number(preset, row, column) for column in columns]
        rows.append([row.method, *numbers, str(row.average or NOTHING)])
    return rows


def _average(record: Mapping[str, Any], preset: Preset, tasks: Sequence[PresetTask]) -> str:
    """Mean over the paper's columns, of the first task of each; only where all have a number."""
    first = {task.column: task for task in reversed(tasks)}
    columns = [column for column in preset.columns if column != PERPLEXITY]
    values, trial = [], False
    for column in columns:
        result = column in first and record["tasks"].get(first[column].key)
        name = result and measured(result["metrics"], first[column].metric)
        if not name:
            return NOTHING
        values.append(result["metrics"][name]["value"])
        trial = trial or result["identity"]["limit"] is not None
    mark = " (trial)" if trial else ""
    return f"{100 * fmean(values):.1f}{mark}" if values else NOTHING


def _cell(record: Mapping[str, Any], task: PresetTask) -> str:
    """The number of a task that stands beside the paper's."""
    result = record["tasks"].get(task.key, {"metrics": {}})
    name = measured(result["metrics"], task.metric)
    if name is None:
        return "failed" if task.key in record["problems"] else NOTHING
    return _number(result, name)


def paper_number(preset: Preset, row: PaperRow, column: str) -> str:
    """The paper's number in a column, as it is printed there."""
    numbers = dict(zip(preset.columns, row.numbers, strict=True))
    return str(numbers.get(column, NOTHING))


def metric_table(results: Mapping[str, Any], preset: Preset, tasks: Sequence[PresetTask]) -> Rows:
    """Every metric with its standard error and every domain's perplexity; a column for a model."""
    names, records = short_names(results), results["models"].values()
    papers = [row for row in preset.rows if row.short]
    rows = [["task-shots", "metric", *names.values(), *(row.short for row in papers)]]
    measures = [record[PERPLEXITY] for record in records if PERPLEXITY in record]
    for domain in dict.fromkeys(name for one in measures for name in (None, *one["domains"])):
        ours = [_perplexity(record.get(PERPLEXITY), domain) for record in records]
        column = PERPLEXITY if domain is None else ""
        theirs = [paper_number(preset, row, column) for row in papers]
        rows.append([PERPLEXITY, domain or "total", *ours, *theirs])
    for task in tasks:
        found = [record["tasks"].get(task.key, {"metrics": {}}) for record in records]
        beside = {measured(one["metrics"], task.metric) for one in found}
        for name in dict.fromkeys(name for one in found for name in one["metrics"]):
            column = task.column if name in beside else ""
            theirs = [paper_number(preset, row, column) for row in papers]
            ours = [_number(one, name) for one in found]
            rows.append([task.key, name.removesuffix(",none"), *ours, *theirs])
    return rows


def _perplexity(measure: Mapping[str, Any] | None, domain: str | None) -> str:
    """exp(loss) of a domain, or in all; its standard error is that of the loss times itself."""
    one = measure and ({None: measure["total"]} | measure["domains"]).get(domain)
    if not one:
        return NOTHING
    loss = Loss(**one)
    error = "" if loss.error is None else f" ± {loss.perplexity * loss.error:.3f}"
    return f"{loss.perplexity:.3f}{error} ({loss.tokens:,} tokens)"


def _number(result: Mapping[str, Any], name: str) -> str:
    """A metric, marked where it is of a trial. LAMBADA's perplexity alone is no share."""
    metric = result["metrics"].get(name)
    if metric is None:
        return NOTHING
    scale, digits = (1, 2) if name.startswith(PERPLEXITY) else (100, 1)
    error = metric["stderr"]
    told = "" if error is None else f" ± {scale * error:.{digits}f}"
    trial = "" if result["identity"]["limit"] is None else " (trial)"
    return f"{scale * metric['value']:.{digits}f}{told}{trial}"


def notes(results: Mapping[str, Any], preset: Preset, tasks: Sequence[PresetTask]) -> list[str]:
    """What a reader of the tables has to know."""
    metrics = ", ".join(f"{task.column} {task.metric.partition(',')[0]}" for task in tasks)
    lines = [f"In percent, ± standard error. Beside the paper's numbers: {metrics}."]
    repeated = Counter(task.column for task in tasks)
    if twice := [column for column, count in repeated.items() if count > 1]:
        lines.append(f"The average has the fewer shots of {', '.join(twice)}.")
    if preset.source:
        lines.append(f"The paper's numbers: {preset.source}.")
    done = [
        (source, task.key, result)
        for source, record in results["models"].items()
        for task in tasks
        if (result := record["tasks"].get(task.key))
    ]
    if any(result["identity"]["limit"] is not None for *_, result in done):
        lines.append(
            "A number marked (trial) is of the first documents only, by --limit: no result."
        )
    lines += [
        f"{source}, {key}: {result['cut_prompts']} of {result['requests']} prompts were cut at "
        f"their start to {result['identity']['max_length']} tokens."
        for source, key, result in done
        if result["cut_prompts"]
    ]
    lines += _unlike(results, tasks)
    lines += [
        f"{source}, {key}: not evaluated, {reason}"
        for source, record in results["models"].items()
        for key, reason in record["problems"].items()
    ]
    return lines


def _unlike(results: Mapping[str, Any], tasks: Sequence[PresetTask]) -> list[str]:
    """Numbers of one row that were got in different ways, as by calls with other options."""
    lines = []
    for key in (PERPLEXITY, *(task.key for task in tasks)):
        found = [
            record.get(key) or record["tasks"].get(key) for record in results["models"].values()
        ]
        identities = [one["identity"] for one in found if one and "identity" in one]
        # The model differs; what it runs on stands in its description.
        ways = [
            {**identity, **{name: identity.get("model", {}).get(name) for name in _ON}}
            for identity in identities
        ]
        names = dict.fromkeys(name for way in ways for name in way if name != "model")
        if differ := [
            name for name in names if any(w.get(name) != ways[0].get(name) for w in ways)
        ]:
            lines.append(
                f"{key}: the models were not evaluated alike, which makes their numbers no "
                f"comparison: {', '.join(differ)}."
            )
    return lines


def as_markdown(rows: Rows) -> str:
    """A table of rows whose first is the head."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_rich(rows: Rows, title: str) -> Table:
    """The same for a terminal."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table
