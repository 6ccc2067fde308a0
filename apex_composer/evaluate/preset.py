"""What is evaluated and beside which numbers: a preset, a YAML of this package or of a user."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).with_name("presets")
PRESETS = ("cpt", "instruct")


@dataclass(frozen=True)
class PresetTask:
    """A task of lm-evaluation-harness at a number of shots.

    Attributes:
        task: the harness's name of a task, group or tag, or one in the package's folder `tasks`.
        column: of the paper's table.
        shots: examples before each question.
        metric: the one that stands beside the paper's number, `metric` or `metric,filter`.
        folder: where the harness has it, below its own folder of tasks; None for ours.
    """

    task: str
    column: str
    shots: int
    metric: str
    folder: str | None = None

    @property
    def key(self) -> str:
        """Its name with its shots: `boolq-32`."""
        return f"{self.task}-{self.shots}"


@dataclass(frozen=True)
class PaperRow:
    """Numbers of the paper for a method.

    Attributes:
        method: heads the row in the paper's layout.
        numbers: one for each of the preset's columns: percent, and perplexity as it is.
        average: of them without perplexity, as the paper prints it.
        short: heads a column of the narrow table; None: it is not shown there.
    """

    method: str
    numbers: Sequence[float]
    average: float | None = None
    short: str | None = None


@dataclass(frozen=True)
class Preset:
    """Tasks, and the paper's numbers for them.

    Attributes:
        name: of the YAML.
        title: heads the table.
        tasks: in the order of the table.
        source: where the paper's numbers stand; empty without any.
        columns: those that have a number in each of `rows`.
        rows: the paper's.
    """

    name: str
    title: str
    tasks: Sequence[PresetTask]
    source: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[PaperRow] = ()


def read_preset(name: str) -> Preset:
    """Read one of `PRESETS`, or a YAML of the same form.

    Raises:
        ValueError: there is none of this name, or it has not the form of a preset.
    """
    import yaml

    path = FOLDER / f"{name}.yaml" if name in PRESETS else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(
            f"--preset {name}: there is none. Allowed are {', '.join(PRESETS)} and the path of a "
            f"YAML of the same form, such as {FOLDER / 'cpt.yaml'}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = [PresetTask(**task) for task in content["tasks"]]
        paper = content.get("paper") or {"source": "", "columns": [], "rows": []}
        rows = [PaperRow(**row) for row in paper["rows"]]
        preset = Preset(path.stem, content["title"], tasks, paper["source"], paper["columns"], rows)
        short = [row.method for row in rows if len(row.numbers) != len(preset.columns)]
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no preset ({type(error).__name__}: {error})") from error
    if short:
        raise ValueError(f"{path}: {short[0]!r} has not one number for each of its columns")
    return preset


def choose_tasks(
    preset: Preset, only: Collection[str] = (), skip: Collection[str] = ()
) -> list[PresetTask]:
    """Those tasks of a preset that are asked for.

    Args:
        preset: has them.
        only: tasks by name (`boolq`) or with their shots (`boolq-32`); empty: all.
        skip: tasks that are left out, by the same names.

    Raises:
        ValueError: a name is of no task of the preset.
    """
    known = {name: None for task in preset.tasks for name in (task.task, task.key)}
    for name in (*only, *skip):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{name}: no task of preset {preset.name}.{meant} It has {', '.join(known)}"
            )
    return [
        task
        for task in preset.tasks
        if (not only or {task.task, task.key} & {*only}) and not {task.task, task.key} & {*skip}
    ]
