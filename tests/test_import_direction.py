"""Who may import whom (design: only three files know Composer, only `ops` knows the kernels)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "apex_composer"
CORE = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem not in ("cli", "__main__")}
KNOW_COMPOSER = {
    "algorithm",
    "closing",
    "forward_passes",
    "out_of_memory",
    "plugins",
    "run_checks",
    "scheduler",
    "stage_rates",
    "stages",
}
TRAINERS = {"composer", "llmfoundry"}
RUNS = {path.stem: path for path in (PACKAGE / "runs").glob("*.py")}
CALLBACKS = {"heartbeat", "preemption", "start_guard"}
HEAVY = TRAINERS | {"torch", "transformers", "streaming"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, inside functions too; not those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def modules_of(node: ast.AST) -> set[str]:
    """Dotted names that one statement imports; `from a import b` counts as `a.b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not followed here"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path) -> set[str]:
    """All that a file imports, in functions too."""
    return set().union(*map(modules_of, statements(ast.parse(path.read_text()))))


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def own_modules(path: Path) -> set[str]:
    """Modules and sub-packages of apex_composer that a file imports, by their first name."""
    known = set(CORE) | {"data_prep", "demo", "runs", "triton_kernels", "cli"}
    own = {name.split(".")[1] for name in imports(path) if name.startswith("apex_composer.")}
    return own & known


def test_only_the_adapter_knows_composer():
    found = {name for name, path in CORE.items() if "composer" in top_level(path)}
    assert found <= KNOW_COMPOSER


def test_nothing_in_the_core_imports_llmfoundry():
    assert {name for name, path in CORE.items() if "llmfoundry" in top_level(path)} == set()


def test_the_plugin_module_is_light():
    # It is imported by every llm-foundry training of an environment, also by those without APEX;
    # Composer is loaded there already. Manifest and kernels are the callbacks' only.
    assert not top_level(CORE["plugins"]) & {"llmfoundry", "torch", "transformers"}
    assert own_modules(CORE["plugins"]) == {"data_prep", "fused_swiglu", "settings"}


def test_only_ops_imports_kernels():
    found = {
        name
        for name, path in CORE.items()
        if "triton_kernels" in own_modules(path) or "triton" in top_level(path)
    }
    assert found <= {"ops"}


def test_the_formulas_stand_at_the_bottom():
    assert own_modules(CORE["full_precision"]) == set()
    assert own_modules(CORE["packed_samples"]) == set()
    assert own_modules(CORE["monarch"]) == {"full_precision"}
    assert own_modules(CORE["reference"]) == {"full_precision", "monarch", "packed_samples"}


def test_the_core_does_not_import_the_jobs_around_it():
    for name, path in CORE.items():
        # The plugins' callback compares a run with the manifest of its data.
        allowed = {"data_prep"} if name == "plugins" else set()
        assert not own_modules(path) & {"data_prep", "demo", "runs", "cli"} - allowed, name


def test_of_the_tools_around_a_run_only_the_callbacks_load_a_trainer():
    """`apex-composer doctor --help` must not wait for Composer; functions may import it."""
    for name, path in RUNS.items():
        module = ast.parse(path.read_text())
        module.body = [
            node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {name.split(".")[0] for node in module.body for name in modules_of(node)}
        assert not names & HEAVY or name in CALLBACKS, name


def test_the_adapter_is_imported_by_nothing_below_it():
    allowed = KNOW_COMPOSER | {"__init__"}
    for name, path in CORE.items():
        if name not in allowed:
            assert not own_modules(path) & KNOW_COMPOSER, name


def test_the_core_has_no_import_cycles():
    graph = {
        name: own_modules(path) & set(CORE) for name, path in CORE.items() if name != "__init__"
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data_prep").rglob("*.py")), ids=lambda path: path.name
)
def test_data_preparation_does_not_import_the_core(path):
    own = {name for name in imports(path) if name.startswith("apex_composer")}
    assert all(name.startswith("apex_composer.data_prep") for name in own)
    assert not top_level(path) & TRAINERS


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
