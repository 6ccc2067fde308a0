"""Who may import whom: a room only those before it, and only a few rooms know a trainer."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from apex_composer.extras import EXTRAS

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "apex_composer": ROOT / "apex_composer",
    "apex_composer.data_prep": ROOT / "data_prep",
    "apex_composer.triton_kernels": ROOT / "triton_kernels",
}
# Each imports itself and what stands in the lines above it. A file of the top is a room of its own.
ORDER = [
    ["extras"],
    ["settings", "distributed", "stopwatch", "data_prep", "triton_kernels"],
    ["ops"],
    ["model"],
    ["assessment"],
    ["operators"],
    ["sharding"],
    ["trainable"],
    ["expander"],
    ["trainer"],
    ["callbacks", "methods"],
    ["tools"],
    ["evaluate"],
    ["observe"],
    ["report"],
    ["demo"],
    ["compare"],
    ["cli"],
]
# Of the files above data_prep's rooms there are two kinds: what all may use, and what uses all.
DATA_ORDER = [
    ["errors", "paths"],
    ["atomic_files", "progress", "options"],
    ["engines"],
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
# These start a trainer or read its files.
STARTERS = ("tools", "evaluate", "observe", "report", "demo", "compare")
# The extras whose packages a room may import in functions. The other rooms need none.
NEED = {
    "data_prep": {"prep", "remote", "ray"},
    **dict.fromkeys(KNOW_COMPOSER, {"foundry"}),
    "methods": {"foundry", "optimizers"},
    **dict.fromkeys(STARTERS, {"foundry", "prep"}),
    "evaluate": {"foundry", "prep", "remote", "eval"},
    "observe": {"foundry", "prep", "remote"},
}
TRAINERS = {"composer", "llmfoundry"}
HEAVY = TRAINERS | {"torch", "transformers", "streaming"}
# What the core's tests do without, and the tests' own modules, which are imported by bare names.
NOT_OF_CORE = TRAINERS | {"streaming", "torch_optimizer", "omegaconf", "typer", "pyarrow"}
HELPERS = {
    path.stem: path
    for folder in ("tests", "tests/sharding", "tests/triton_kernels", "tests/trainer")
    for path in (ROOT / folder).glob("*.py")
    if not path.stem.startswith(("test_", "conftest"))
}


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


def imports_of(path: Path) -> frozenset[str]:
    """All that a file imports, in functions and for type checkers too."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset().union(*map(modules_of, nodes))


@cache
def imports(module: str) -> frozenset[str]:
    return imports_of(sources()[module])


def packages(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def top_level(module: str) -> set[str]:
    return packages(imports(module))


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
            if room(other) == "extras":  # the first of all rooms, and none of data_prep's
                continue
            here, there = room(module, depth), room(other, depth)
            if here != there and place[there] >= place[here]:
                found.add((here, there))
    return found


def test_rooms_import_only_those_before_them():
    assert crossings(list(of_core()), ORDER, 1) == set()


def test_rooms_of_data_preparation_import_only_those_before_them():
    modules = [module for module in sources() if room(module) == "data_prep"]
    assert len(modules) > 30
    others = {room(other) for module in modules for other in own(module)} - {"data_prep"}
    assert others == {"extras"}
    assert crossings(modules, DATA_ORDER, 2) == set()


def test_there_are_no_import_cycles():
    graph = {module: own(module) for module in sources()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_only_three_rooms_know_composer():
    found = {room(module) for module in of_core() if "composer" in top_level(module)}
    assert found <= KNOW_COMPOSER | {*STARTERS}
    # In functions: they are not a part of a trainer.
    for module in of_core():
        if room(module) in STARTERS:
            assert not at_import(module) & TRAINERS, module


def test_the_core_imports_neither_llmfoundry_nor_transformers():
    for module in of_core():
        if room(module) not in (*STARTERS, "cli"):
            allowed = TRAINERS if room(module) in KNOW_COMPOSER else set()
            assert not top_level(module) & {"llmfoundry", "transformers"} - allowed, module


def test_only_ops_imports_kernels():
    for module in of_core():
        if room(module) != "ops":
            assert not any("triton_kernels" in name for name in own(module)), module
            assert "triton" not in top_level(module), module


def core_test_files() -> set[Path]:
    """The Makefile's CORE_TESTS, the helpers that they import, and what pytest loads with them."""
    named = re.search(r"^CORE_TESTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    paths = [ROOT / name for name in named[1].replace("\\", "").split()]
    waiting = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    waiting.append(ROOT / "tests" / "conftest.py")
    found = set()
    while waiting:
        found.add(path := waiting.pop())
        own_helpers = {HELPERS[name] for name in packages(imports_of(path)) & HELPERS.keys()}
        waiting += own_helpers - found
    return found


def test_tests_of_the_core_need_no_trainer():
    files = core_test_files()
    assert len(files) > 40 and HELPERS["oracle"] in files
    # It changes how streaming counts, where streaming is installed.
    for path in files - {HELPERS["own_names"]}:
        assert not packages(imports_of(path)) & NOT_OF_CORE, path


def outside_of_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when a module is loaded; not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        for_checkers = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not for_checkers and not isinstance(child, ast.FunctionDef):
            yield child
            yield from outside_of_functions(child)


def at_import(module: str) -> set[str]:
    """Packages that are loaded as soon as a module is."""
    nodes = outside_of_functions(ast.parse(sources()[module].read_text()))
    return {name.split(".")[0] for name in set().union(*map(modules_of, nodes))}


def test_modules_load_with_the_core_alone_and_ask_for_no_more_than_their_extras():
    wanted = map(Requirement, requires("apex-composer"))
    core = {one.name for one in wanted if "extra" not in str(one.marker)}
    for module in sources():
        # torch brings triton: ops asks whether it is there.
        own = core | ({"triton"} if room(module) == "triton_kernels" else set())
        composer = {"composer"} if room(module) in KNOW_COMPOSER else set()
        ours = sys.stdlib_module_names | {"apex_composer"}
        assert at_import(module) - ours <= own | composer, module
        extras = [set(EXTRAS[extra]) for extra in NEED.get(room(module), ())]
        assert top_level(module) - ours <= own.union(*extras), module


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
    heavy = {"torch", "transformers", "ray"}
    assert modules_after("import apex_composer.data_prep") & heavy == set()
