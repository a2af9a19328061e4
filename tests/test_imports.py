"""The direction of imports: readers of one definition stay independent by not seeing each other.

A module of qnpu_jax imports lower levels only. Within a level of PEERS, modules build on each other
(prefix on evaluate, pipeline on weights), which is allowed while no cycle arises. Imports inside
functions count.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    name: level
    for level, names in enumerate([
        "ops config",
        "graph recipes orthogonal columns",
        "quant decoder rotate",
        "evaluate prefix freeze models generate corpus calibrate resolve accumulators equivalent"
        " intermediates flatbuffer op_version contents stored spelling squares",
        "tflite litert evaluation tasks verify artifacts module weights learn pipeline texts proof"
        " widths job deploy npu diagnose attribution tally diagnosis overlay heat_map",
        "cli",
        "__init__",  # a table of contents: no module imports it
    ])
    for name in names.split()
}  # fmt: skip
PEERS = {3, 4}  # levels whose modules may import one another
SIM_IMPORTS = {
    "intermediates",
    "ops",
    "graph",
    "freeze",
    "config",
    "accumulators",
}  # all that sim may see of qnpu_jax
SIM_IMPORTERS = {"cli"}  # all of qnpu_jax that may see sim
FILES = [p for package in ("qnpu_jax", "sim") for p in sorted((ROOT / package).rglob("*.py"))]


def module(dotted: str) -> tuple[str, str]:
    """("qnpu_jax", "models") of "qnpu_jax.models.hf.load": a subpackage counts as one module."""
    package, name, *_ = *dotted.split("."), "__init__"
    return package, name


def module_of(path: Path) -> tuple[str, str]:
    return module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def imports(path: Path) -> set[tuple[str, str]]:
    """Modules of ours that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module(n) for n in names if n.split(".")[0] in ("qnpu_jax", "sim")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package, name = module_of(path)
    assert package == "sim" or name in LEVELS, f"{path}: not in LEVELS; give the new module a level"
    for other_package, other in imports(path) - {(package, name)}:
        where = f"{path} imports {other_package}.{other}"
        match package, other_package:
            case "sim", "qnpu_jax":
                assert other in SIM_IMPORTS, where
            case "qnpu_jax", "sim":
                assert name in SIM_IMPORTERS, where
            case "qnpu_jax", "qnpu_jax":
                assert other in LEVELS, f"{where}: not in LEVELS; give the new module a level"
                below, above = LEVELS[other], LEVELS[name]
                assert below < above or (below == above and above in PEERS), where


def test_no_cycles():
    needs: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for path in FILES:
        needs.setdefault(module_of(path), set()).update(imports(path) - {module_of(path)})
    TopologicalSorter(needs).prepare()  # CycleError names the cycle
