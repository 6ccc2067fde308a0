"""Writes docs/settings.md from signatures, docstrings and the command line: `make docs`."""

import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path, PurePath
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every setting of every algorithm, scheduler, optimizer, callback and logger of this package in an
llm-foundry YAML, of `Expander`, and of every command. **Written by `make docs`** from signatures
and docstrings: change them there. A setting whose default is empty must be given; `-` is nothing,
or another package's default. The docstring of the file named says more, and what is refused.
"""
# Entry points of llm-foundry: their group, the heading here, the key in a YAML.
GROUPS = {
    "llmfoundry_algorithms": ("Algorithms", "algorithms: {{{0}: {{}}}}"),
    "llmfoundry_schedulers": ("Schedulers", "scheduler: {{name: {0}}}"),
    "llmfoundry_optimizers": ("Optimizers", "optimizer: {{name: {0}}}"),
    "llmfoundry_callbacks": ("Callbacks", "callbacks: {{{0}: {{}}}}"),
    "llmfoundry_callbacks_with_config": ("Callbacks", "callbacks: {{{0}: {{}}}}"),
    "llmfoundry_loggers": ("Loggers", "loggers: {{{0}: {{}}}}"),
}
# What is handed in by llm-foundry, not by a YAML.
NOT_SETTINGS = {"params", "train_config", "sites", "own"}
Row = tuple[str, str, str]  # a setting, its default, what it means


def make_page() -> str:
    """The whole page."""
    warnings.simplefilter("ignore")
    parts = [HEAD]
    for title in dict.fromkeys(title for title, _ in GROUPS.values()):
        found = sorted(objects(title))
        parts += [f"## {title}\n"] if found else []
        parts += [section(name, key, thing) for name, key, thing in found]
    from apex_composer import Expander

    loop = "in a loop of your own: `Expander(find_sites(model), ...)`"
    parts += ["## Without Composer\n", section("Expander", loop, Expander), "## Commands\n"]
    return "\n".join([*parts, *commands()])


def objects(title: str) -> Iterator[tuple[str, str, Any]]:
    """Yield name, YAML and class of the entry points under a heading."""
    for point in distribution("apex-composer").entry_points:
        heading, key = GROUPS.get(point.group, ("", ""))
        if heading == title:
            yield point.name, f"`{key.format(point.name)}`", point.load()


def section(name: str, key: str, thing: Any) -> str:
    """A class as its first sentence and its settings."""
    sentence = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    path = Path(inspect.getsourcefile(thing)).relative_to(ROOT)
    lines = [f"### {name}\n", f"{key}. {escape(sentence)} ([{path}](../{path}))\n"]
    return "\n".join([*lines, *table("setting", settings(thing)), ""])


def settings(thing: type) -> list[Row]:
    """The settings of a class, and of its base where it hands `given` on, in their order."""
    documented = arguments(inspect.getdoc(thing))
    signature = inspect.signature(thing).parameters
    base = thing.__mro__[1]
    inherited = {row[0]: row for row in settings(base)} if _handed_on(thing, base) else {}
    rows = {}
    for name in dict.fromkeys([*signature, *documented]):
        variadic = name in signature and signature[name].kind == inspect.Parameter.VAR_KEYWORD
        if name in NOT_SETTINGS or variadic:
            continue
        default = shown(signature[name].default) if name in signature else "-"
        rows[name] = (name, default, documented.get(name, ""))
    return list((inherited | rows).values())


def _handed_on(thing: type, base: type) -> bool:
    """Whether the settings that are not its own go to a base class of this package."""
    return "given" in inspect.signature(thing).parameters and base.__module__ == thing.__module__


def arguments(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section `Args`, each in one line."""
    block = re.search(r"^Args:\n((?:[ ]+.*\n?|\n(?=[ ]))+)", docstring, re.MULTILINE)
    if block is None:
        return {}
    entries = re.split(r"^(?=\w+: )", textwrap.dedent(block[1]), flags=re.MULTILINE)
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries if entry.strip())
    return {name: meaning for name, meaning in pairs}


def commands() -> Iterator[str]:
    """Yield every command with its arguments and options."""
    from typer.main import get_command

    from apex_composer.cli import app

    for name, command in get_command(app).commands.items():
        text = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
        rows = [option(parameter) for parameter in command.params]
        lines = [f"### apex-composer {name}\n", escape(text) + "\n"]
        yield "\n".join([*lines, *table("argument, option", rows), ""])


def option(parameter: Any) -> Row:
    """An argument or option of a command."""
    places = parameter.param_type_name == "argument"
    name = parameter.name.upper() if places else ", ".join(parameter.opts)
    several = places and parameter.nargs != 1
    must = parameter.required or parameter.default not in (None, (), [])
    default = inspect.Parameter.empty if parameter.required else parameter.default
    help = parameter.help or ""
    return f"{name}..." if several else name, shown(default) if must else "-", help


def shown(value: Any) -> str:
    """A default as a YAML has it; of a file in this package its path from the root on."""
    if value is inspect.Parameter.empty:
        return ""
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`".replace(" ", "")
    if isinstance(value, list | tuple):
        return f"`[{', '.join(shown(each).strip('`') for each in value)}]`"
    if isinstance(value, PurePath) and value.is_absolute():
        value = value.relative_to(ROOT)
    return f"`{value.as_posix() if isinstance(value, PurePath) else value}`" if value != "" else "-"


def table(head: str, rows: list[Row]) -> list[str]:
    """Rows as Markdown."""
    if not rows:
        return ["No settings."]
    cells = [f"| `{name}` | {default} | {escape(meaning)} |" for name, default, meaning in rows]
    return [f"| {head} | default | meaning |", "|---|---|---|", *cells]


def escape(text: str) -> str:
    """Text as Markdown shows it: what is not code is taken literally, and no cell ends early."""
    parts = re.split(r"(`[^`]*`)", text)
    literal = [p if p.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", p) for p in parts]
    return "".join(literal).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(make_page())
