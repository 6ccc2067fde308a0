import re
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, entry_points, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from apex_composer.extras import EXTRAS, NEWEST_PYTHON

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPTIONAL = PROJECT["project"]["optional-dependencies"]
CONSTRAINTS = ["constraints.txt", "constraints-core.txt"]


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def asked_for(*extras: str) -> Iterator[Requirement]:
    """What the package asks for with these extras on this Python, extras of extras included."""
    wanted = [*PROJECT["project"]["dependencies"]]
    wanted += [line for extra in extras for line in OPTIONAL[extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name == "apex-composer":
            yield from asked_for(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


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
        folder = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        assert all(list(folder.glob(pattern)) for pattern in patterns)


def test_top_level_folders_are_imported_as_sub_packages():
    spec = find_spec("apex_composer.data_prep")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).name == "__init__.py"


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_are_versions_only(name):
    # No hosts, hashes, paths or wheels: where packages come from is each machine's own setting.
    for line in pins(name):
        assert re.fullmatch(
            r"[a-z0-9-]+==[0-9A-Za-z.+]+(; python(_full)?_version (<|>=) \"[0-9.]+\")?", line
        ), f"{name}: {line!r} is not `name==version` with an optional Python version"


@pytest.mark.parametrize("python", ["3.10.0", "3.11.2", "3.11.9", "3.12.1"])
def test_constraints_pin_each_package_once_on_every_python(python):
    environment = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
    }
    for name in CONSTRAINTS:
        all_pins = map(Requirement, pins(name))
        names = [p.name for p in all_pins if not p.marker or p.marker.evaluate(environment)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "extra"), zip(CONSTRAINTS, ("dev", "test-core"), strict=True))
def test_constraints_pin_what_pyproject_asks_for(name, extra):
    pinned = {
        pin.name: pin
        for pin in map(Requirement, pins(name))
        if pin.marker is None or pin.marker.evaluate()
    }
    for wanted in asked_for(extra):
        version = next(iter(pinned[wanted.name].specifier)).version
        assert wanted.specifier.contains(version), f"{wanted} against {pinned[wanted.name]}"


def test_the_core_is_alone():
    assert {wanted.name for wanted in asked_for()} == {
        *("torch", "numpy", "tqdm", "typer", "rich", "packaging")
    }
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    pinned = {Requirement(line).name for line in pins("constraints-core.txt")}
    assert not pinned & {"mosaicml", "llm-foundry", "mosaicml-streaming", "omegaconf"}


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.13", "3.14"])
def test_pip_refuses_llm_foundry_on_a_python_without_its_tests(python):
    lines = [Requirement(line) for line in OPTIONAL["foundry"] if line.startswith("llm-foundry")]
    (one,) = [line for line in lines if line.marker.evaluate({"python_version": python})]
    tested = tuple(map(int, python.split("."))) <= NEWEST_PYTHON
    assert one.specifier.contains("0.22.0") is tested


def installs(extra: str) -> set[str]:
    """Distributions that an extra names, and those that these ask for in their turn."""
    direct = {wanted.name for wanted in asked_for(extra)}
    indirect = (Requirement(line) for name in direct for line in requires(name) or ())
    return {canonicalize_name(name) for name in (*direct, *(one.name for one in indirect))}


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra not in ("gpu", "ray")])
def test_an_extra_brings_the_packages_that_are_asked_for_in_its_name(extra):
    providers = packages_distributions()
    for package in EXTRAS[extra]:
        assert {*map(canonicalize_name, providers[package])} & installs(extra), package


def test_the_readme_names_the_oldest_torch_and_the_newest():
    readme = " ".join((ROOT / "README.md").read_text().split())
    (torch,) = [wanted for wanted in asked_for() if wanted.name == "torch"]
    assert f"torch {next(iter(torch.specifier)).version} or newer" in readme
    newest = dict(line.split("==") for line in pins("constraints-core.txt"))
    assert f"torch {newest['torch']} and transformers {newest['transformers']}" in readme


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
