"""Files, functions and signatures stay small: a reader holds one at a time."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("qnpu_jax", "sim", "benchmarks")
FILES = sorted(p for f in (*PACKAGES, "tests") for p in (ROOT / f).rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS, FILES_OF_THE_ROOT = 400, 50, 8, 14
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function of a file, those inside others too, and where it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def lines_of(node: Function) -> int:
    """From `def` to the last line, the docstring with them."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def parameters_of(node: Function) -> int:
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")])


def is_command(path: Path, node: Function) -> bool:
    """A command's options are its parameters."""
    decorators = (ast.unparse(d) for d in node.decorator_list)
    return path.parent.name == "cli" and any(".command(" in d for d in decorators)


def test_no_file_is_longer_than_400_lines():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert len(sizes) > 200
    assert {p: n for p, n in sizes.items() if n > LINES_OF_A_FILE} == {}


def test_no_function_is_longer_than_50_lines():
    found = {name: lines_of(node) for path in FILES for name, node in functions(path)}
    assert {name: n for name, n in found.items() if n > LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_has_more_than_8_parameters(package):
    paths = [p for p in FILES if p.is_relative_to(ROOT / package)]
    found = {
        name: parameters_of(node)
        for path in paths
        for name, node in functions(path)
        if not is_command(path, node)
    }
    assert found
    assert {name: n for name, n in found.items() if n > PARAMETERS} == {}


def test_the_root_of_the_package_holds_few_files():
    assert len([*(ROOT / "qnpu_jax").glob("*.py")]) <= FILES_OF_THE_ROOT


def test_lines_and_parameters_are_counted():
    """self is no parameter; a function inside another is one more."""
    inner = "        def g():\n            return a\n\n        return g\n"
    tree = ast.parse("class A:\n    def f(self, a, *, b):\n" + inner)
    found = {n.name: n for n in ast.walk(tree) if isinstance(n, Function)}
    assert [(n, lines_of(f), parameters_of(f)) for n, f in sorted(found.items())] == [
        ("f", 5, 2),
        ("g", 2, 0),
    ]
