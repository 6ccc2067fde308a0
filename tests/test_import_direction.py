"""Who may import whom: a room only those before it, and only a few rooms know a trainer."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "apex_composer": ROOT / "apex_composer",
    "apex_composer.data_prep": ROOT / "data_prep",
    "apex_composer.triton_kernels": ROOT / "triton_kernels",
}
# Each imports itself and what stands in the lines above it. A file of the top is a room of its own.
ORDER = [
    ["settings", "distributed", "stopwatch", "data_prep", "triton_kernels"],
    ["ops"],
    ["model"],
    ["assessment"],
    ["operators"],
    ["sharding"],
    ["expander"],
    ["trainer"],
    ["callbacks", "methods"],
    ["tools"],
    ["demo"],
    ["cli"],
]
# Of the files above data_prep's rooms there are two kinds: what all may use, and what uses all.
DATA_ORDER = [
    ["errors", "paths"],
    ["atomic_files", "progress", "workers", "options"],
    ["read"],
    ["tokens"],
    ["choose"],
    ["write"],
    ["output_folder", "pieces"],
    ["preparation", "dry_run"],
    ["instruct"],
    ["__init__"],
    ["__main__"],
]
KNOW_COMPOSER = {"trainer", "callbacks", "methods"}
TRAINERS = {"composer", "llmfoundry"}
HEAVY = TRAINERS | {"torch", "transformers", "streaming"}


def modules_of(node: ast.AST) -> set[str]:
    """Dotted names that one statement imports; `from a import b` counts as `a.b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not followed here"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


@cache
def sources() -> dict[str, Path]:
    """All modules of the project by their dotted names."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            found[".".join((package, *path.relative_to(folder).with_suffix("").parts))] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, in functions and for type checkers too."""
    nodes = ast.walk(ast.parse(sources()[module].read_text()))
    return frozenset().union(*map(modules_of, nodes))


def top_level(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


@cache
def own(module: str) -> frozenset[str]:
    """Those of the project's modules that a module imports."""
    found = set()
    for name in imports(module):
        while name and name not in sources() and f"{name}.__init__" not in sources():
            name = name.rpartition(".")[0]
        if name:
            found.add(name if name in sources() else f"{name}.__init__")
    return frozenset(found - {module, "apex_composer.__init__"})


def room(module: str, depth: int = 1) -> str:
    return module.split(".")[depth]


def of_core() -> Iterator[str]:
    """The modules in apex_composer/ itself, without the public names' lazy `__init__`."""
    for module in sources():
        if room(module) not in ("data_prep", "triton_kernels", "__init__"):
            yield module


def crossings(modules: list[str], order: list[list[str]], depth: int) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second without being allowed to."""
    place = {name: number for number, row in enumerate(order) for name in row}
    found = set()
    for module in modules:
        for other in own(module):
            here, there = room(module, depth), room(other, depth)
            if here != there and place[there] >= place[here]:
                found.add((here, there))
    return found


def test_rooms_import_only_those_before_them():
    assert crossings(list(of_core()), ORDER, 1) == set()


def test_rooms_of_data_preparation_import_only_those_before_them():
    modules = [module for module in sources() if room(module) == "data_prep"]
    assert len(modules) > 30
    assert all(own_room == "data_prep" for m in modules for own_room in map(room, own(m)))
    assert crossings(modules, DATA_ORDER, 2) == set()


def test_there_are_no_import_cycles():
    graph = {module: own(module) for module in sources()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_only_three_rooms_know_composer():
    found = {room(module) for module in of_core() if "composer" in top_level(module)}
    assert found <= KNOW_COMPOSER | {"demo", "tools"}
    # These start a trainer or read its files in functions, and are not a part of one.
    for module in of_core():
        if room(module) in ("demo", "tools"):
            assert not at_import(module) & TRAINERS, module


def test_the_core_imports_neither_llmfoundry_nor_transformers():
    for module in of_core():
        if room(module) not in ("demo", "tools", "cli"):
            allowed = TRAINERS if room(module) in KNOW_COMPOSER else set()
            assert not top_level(module) & {"llmfoundry", "transformers"} - allowed, module


def test_only_ops_imports_kernels():
    for module in of_core():
        if room(module) != "ops":
            assert not any("triton_kernels" in name for name in own(module)), module
            assert "triton" not in top_level(module), module


def at_import(module: str) -> set[str]:
    """Packages that are loaded as soon as a module is: imports outside of functions."""
    body = ast.parse(sources()[module].read_text()).body
    nodes = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name.split(".")[0] for name in set().union(*map(modules_of, nodes))}


def test_the_transform_of_configurations_is_light():
    # It is imported by every llm-foundry training of an environment, also by those without APEX;
    # Composer is loaded there already.
    module = "apex_composer.trainer.config_transform"
    assert not top_level(module) & {"llmfoundry", "torch", "transformers"}


@pytest.mark.parametrize("module", sorted(m for m in sources() if ".tools." in m))
def test_commands_start_without_a_trainer(module):
    """`apex-composer doctor --help` must not wait for Composer; functions may import it."""
    assert not at_import(module) & HEAVY


def modules_after(program: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


def test_importing_the_package_starts_no_trainer():
    assert modules_after("import apex_composer") & {"composer", "llmfoundry", "triton"} == set()


def test_importing_data_preparation_starts_no_torch():
    assert modules_after("import apex_composer.data_prep") & {"torch", "transformers"} == set()
