"""The report as one HTML file: no scripts, nothing from outside."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import write_text
from apex_composer.report.answers import TOTAL, Answer, Estimate, answer
from apex_composer.report.charts import (
    mean_ranks,
    operator_charts,
    rank_charts,
    spread_charts,
    step_chart,
    training_charts,
    validation_charts,
)
from apex_composer.report.curves import Chart, make_axis, runs_of
from apex_composer.report.drawing import COLOURS, DASHES, colour_and_dashes, show_tokens
from apex_composer.report.maps import UNITS, overlaps, stage_maps
from apex_composer.report.read_run import read_runs
from apex_composer.report.run import Run

TEMPLATE = "page.html.j2"
# Larger numbers have an exponent.
MOST_DECIMAL = 1e6
# More groups than these are counted in the title.
MOST_NAMES = 5


def write_report(
    paths: Sequence[Path], out: Path, *, baselines: Sequence[str] = (), title: str | None = None
) -> Answer:
    """Read runs, compare them and write the page.

    Args:
        paths: folders of runs.
        out: HTML file.
        baselines: names of the runs to compare with. Default: found by rule.
        title: of the page. Default: the names of the groups.

    Returns:
        What the page says.

    Raises:
        OSError, ValueError: a run cannot be read, or a baseline is none of them.
    """
    compared = answer(read_runs(paths), baselines)
    write_text(out, make_page(compared, title or make_title(compared)))
    return compared


def make_title(compared: Answer) -> str:
    """The names of the groups, those of the baselines last: `apex against vanilla`."""
    first = [group.name for group in compared.groups if not group.baseline]
    last = [group.name for group in compared.groups if group.baseline]
    if len(compared.groups) > MOST_NAMES:
        first = [f"{len(first)} runs"] if first else []
        last = [*compared.baselines[:1], *([f"{len(last) - 1} more"] if len(last) > 1 else [])]
    return " against ".join(", ".join(names) for names in (first, last) if names)


def make_page(compared: Answer, title: str) -> str:
    """Write what is said of runs, and what they did.

    Args:
        compared: the runs and what is said of them.
        title: of the page.

    Returns:
        HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": show_number,
        "interval": show_interval,
        "tokens": show_tokens,
        "share": lambda value: f"{100 * value:.1f} %",
        "value": show_value,
    }
    runs = runs_of(compared)
    axis = make_axis(compared)
    return environment.get_template(TEMPLATE).render(
        title=title,
        answer=compared,
        look={group.name: _look(number) for number, group in enumerate(compared.groups)},
        colours=len(COLOURS),
        boundaries=axis.boundaries,
        validation=_kept(validation_charts(axis, compared)),
        training=_kept(training_charts(axis, runs)),
        operators=_kept(operator_charts(axis, runs)),
        steps=_kept([step_chart(axis, runs)]),
        staged=[_stages(run) for run in runs if run.stages],
        ranked=[_ranks(run) for run in runs if mean_ranks(run)],
        ranks=list(rank_charts(compared)),
        columns=sorted(compared.domains, key=lambda domain: domain != TOTAL),
        same_data=_same_data(runs),
        runs=runs,
    )


def _kept(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _look(style: int) -> dict[str, Any]:
    colour, dashes = colour_and_dashes(style)
    return {"colour": colour, "dashes": " ".join(str(2 * part) for part in DASHES[dashes])}


def _stages(run: Run) -> dict[str, Any]:
    maps = [(s, [one for unit in UNITS for one in stage_maps(s, unit)]) for s in run.stages]
    return {
        "run": run,
        "maps": [(stage, found) for stage, found in maps if found],
        "overlaps": overlaps(run),
        "spread": list(spread_charts(run)),
    }


def _ranks(run: Run) -> dict[str, Any]:
    means = mean_ranks(run)
    files = list(dict.fromkeys(file for own in means.values() for file in own))
    return {"run": run, "means": means, "files": files}


def _same_data(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    """What all runs know alike of their data; None where they differ."""
    return runs[0].data if all(run.data == runs[0].data for run in runs) else None


def show_number(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """A number with so many digits that count, and a real minus."""
    if value is None or not math.isfinite(value):
        return "–"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:{'+' if signed else ''},.{min(places, 6)}f}"
    return text.replace("-", "−")


def show_interval(estimate: Estimate, places: int = 3, *, signed: bool = False) -> str:
    """An estimate, and its 95 % interval where there is one: `+0.012 (−0.003 to +0.027)`."""
    if not math.isfinite(estimate.mean):
        return "no number"
    sign = "+" if signed else ""
    form = f"{sign},.{places}f" if abs(estimate.mean) < MOST_DECIMAL else f"{sign}.3g"
    text = f"{estimate.mean:{form}}"
    if estimate.low is not None:
        text += f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return text.replace("-", "−")


def show_value(value: Any) -> str:
    """A value of the data's description: large counts with commas."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {show_value(own)}" for key, own in value.items())
    return str(value)
