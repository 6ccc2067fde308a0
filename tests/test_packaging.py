import re
import sys
from importlib.metadata import distribution, entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def folders_with_modules(package: str, folder: Path) -> set[str]:
    """Dotted names of `folder` and of the packages below it."""
    inits = folder.rglob("__init__.py")
    parts = [init.parent.relative_to(folder).parts for init in inits]
    return {".".join((package, *part)) for part in parts}


def test_every_package_of_the_source_tree_is_shipped():
    setuptools = PROJECT["tool"]["setuptools"]
    expected: set[str] = set()
    for package, folder in setuptools["package-dir"].items():
        expected |= folders_with_modules(package, ROOT / folder)
    assert set(setuptools["packages"]) == expected | set(setuptools["package-data"])
    for package, patterns in setuptools["package-data"].items():
        folder = ROOT / setuptools["package-dir"][package]
        assert all(list(folder.glob(pattern)) for pattern in patterns)


def test_top_level_folders_are_imported_as_sub_packages():
    spec = find_spec("apex_composer.data_prep")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).name == "__init__.py"


def test_constraints_are_versions_only():
    # No hosts, hashes, paths or wheels: where packages come from is each machine's own setting.
    for line in PINS:
        assert re.fullmatch(
            r"[a-z0-9-]+==[0-9A-Za-z.+]+(; python(_full)?_version (<|>=) \"[0-9.]+\")?", line
        ), f"constraints.txt: {line!r} is not `name==version` with an optional Python version"


@pytest.mark.parametrize("python", ["3.10.0", "3.11.2", "3.11.9", "3.12.1"])
def test_constraints_pin_each_package_once_on_every_python(python):
    environment = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
    }
    pins = [Requirement(line) for line in PINS]
    names = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
    assert len(names) == len(set(names))


def test_constraints_admit_what_pyproject_asks_for():
    pins = {
        pin.name: pin
        for pin in map(Requirement, PINS)
        if pin.marker is None or pin.marker.evaluate()
    }
    optional = PROJECT["project"]["optional-dependencies"]
    for wanted in map(Requirement, PROJECT["project"]["dependencies"] + optional["dev"]):
        version = next(iter(pins[wanted.name].specifier)).version
        assert wanted.specifier.contains(version), f"{wanted} against {pins[wanted.name]}"


def test_installed_entry_points_are_those_of_pyproject():
    installed = {
        (point.group, point.name): point.value
        for point in distribution("apex-composer").entry_points
    }
    declared = {
        (group, name): value
        for group, names in PROJECT["project"]["entry-points"].items()
        for name, value in names.items()
    }
    declared["console_scripts", "apex-composer"] = PROJECT["project"]["scripts"]["apex-composer"]
    assert installed == declared, "run `make install` again: the entry points have changed"


def test_entry_points_load():
    for group in PROJECT["project"]["entry-points"]:
        for point in entry_points(group=group):
            if point.value.startswith("apex_composer."):
                assert callable(point.load())
