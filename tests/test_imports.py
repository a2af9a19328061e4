"""The direction of imports: readers of one definition stay independent by not seeing each other.

A file imports from its own folder or from a lower level; outsiders import a folder's face, its
`__init__`. Imports inside functions count. Tests, benchmarks and scripts may import any file.
"""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    name: level
    for level, names in enumerate([
        "choices errors heap",
        "artifacts extras progress width_ties",
        "config",
        "graph",
        "fakequant integer models recipes",
        "qnpu_sim tflite transform",
        "calibrate output runtime text",
        "learn measure proof",
        "compilers diagnose latency pipeline",
        "deploy job own_text plan",
        "api cli",
        "__init__",
    ])
    for name in names.split()
}  # fmt: skip
"""Level of each folder, and of each file at the root."""
SIM_SEES = {"errors", "graph.graph", "graph.ops", "graph.shared_names", "integer.accumulators"}
SIM_SEES |= {"integer.freeze", "integer.intermediates", "integer.model", "integer.simulator"}
"""All of `qnpu_jax` that `qnpu_sim` may import."""
SIM_REACHES = {"artifacts", "choices", "config", "errors", "graph", "integer", "width_ties"}
"""All of `qnpu_jax` that it may reach through those: no float evaluation, nothing that learns."""
PACKAGES = {"qnpu_jax": ROOT / "qnpu_jax", "qnpu_sim": ROOT / "sim" / "qnpu_sim"}


def files() -> dict[str, Path]:
    """Every file by module: "qnpu_jax.graph.ops", "qnpu_jax.graph" for a folder's face."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


FILES = files()


def top(module: str) -> str:
    """The folder, or the file at the root, of a module: "graph" of "qnpu_jax.graph.ops"."""
    package, _, rest = module.partition(".")
    return "qnpu_sim" if package == "qnpu_sim" else rest.split(".")[0] or "__init__"


@functools.cache
def imports(module: str) -> frozenset[tuple[str, str]]:
    """What a file imports of ours: (module, name), the name empty where a module is imported."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add((whole, "") if whole in FILES else (node.module, alias.name))
    return frozenset((m, n) for m, n in found if m.split(".")[0] in PACKAGES)


def source(module: str, name: str) -> str:
    """The file that defines what a face gives under this name."""
    if name and FILES[module].name == "__init__.py":
        for other, same in imports(module):
            if same == name and other != module:
                return source(other, name)
    return module


def resolved(module: str) -> Iterator[str]:
    """Files behind the imports of a file, looked up through faces."""
    for other, name in imports(module):
        yield source(other, name)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    assert top(module) in LEVELS, f"{module}: not in LEVELS; give the new folder or file a level"
    for other, _ in imports(module):
        assert other in FILES, f"{module} imports {other}, which is not there"
        below, above = top(other), top(module)
        if below == above or other == "qnpu_jax":
            continue
        assert LEVELS[below] < LEVELS[above], f"{module} imports {other}: not of a lower level"


@pytest.mark.parametrize("module", FILES)
def test_outsiders_import_the_face(module):
    for other, name in imports(module):
        if top(other) == top(module) or other.count(".") < 2:
            continue
        assert not name, f"{module} imports {name} from {other}; import it from the folder's face"


def test_no_cycles():
    needs = {m: {o for o in resolved(m) if o != m} for m in FILES if not is_face(m)}
    TopologicalSorter(needs).prepare()  # CycleError names the cycle


def is_face(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def test_faces_are_sorted_lists_of_what_they_import():
    for module, path in FILES.items():
        if not is_face(module) or module in ("qnpu_jax", "qnpu_jax.cli"):
            continue
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{module}: says nothing"
        listed = next(n.value for n in tree.body if isinstance(n, ast.Assign))
        names = set(ast.literal_eval(listed))
        assert names == {n for _, n in imports(module) if n}, module


SIM = [m for m in FILES if m.startswith("qnpu_sim")]


@pytest.mark.parametrize("module", SIM)
def test_the_simulator_sees_only_graphs_and_integers(module):
    for other in resolved(module):
        if other.startswith("qnpu_jax"):
            assert other.removeprefix("qnpu_jax.") in SIM_SEES, f"{module} imports {other}"


def test_the_simulator_reaches_no_float_evaluation():
    reached, todo = set(), set(SIM)
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= set(resolved(module)) - reached
    assert {top(m) for m in reached} <= SIM_REACHES | {"qnpu_sim"}, sorted(reached)
    assert "qnpu_jax.graph.ops" in reached  # that something was followed
