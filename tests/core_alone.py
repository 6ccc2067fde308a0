"""Packages made absent, and the command line with the core alone: `python tests/core_alone.py`."""

import sys
from collections.abc import Collection
from importlib.machinery import PathFinder

FIND = PathFinder.find_spec


def finder_without(packages: Collection[str]) -> staticmethod:
    """Python's own search for modules, which does not find these packages."""

    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in packages else FIND(name, path, target)

    return staticmethod(find_spec)  # some call it on an instance


def run_commands() -> None:
    """Run each line of the standard input as a command; print its exit status and its output."""
    from typer.testing import CliRunner

    import apex_composer.data_prep  # noqa: F401
    from apex_composer import Expander, FusedSwiGLU, MonarchFactors, find_sites  # noqa: F401
    from apex_composer.cli import app
    from apex_composer.tools import doctor

    doctor.check_distributed = lambda: []  # a process of its own, in which nothing is hidden
    for line in sys.stdin.read().splitlines():
        result = CliRunner().invoke(app, line.split())
        print(result.exit_code, " ".join(result.output.split()))


if __name__ == "__main__":
    from apex_composer.extras import EXTRAS

    PathFinder.find_spec = finder_without({name for names in EXTRAS.values() for name in names})
    run_commands()
