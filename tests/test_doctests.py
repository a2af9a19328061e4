"""Every example in a docstring runs, and every function of the face has one."""

import contextlib
import doctest
import importlib.util
import inspect
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
from workspace import PREFILL

import qnpu_jax
import qnpu_sim
from qnpu_jax.integer import storage

MARK = ">>> "
"""What an example begins with."""


def sources() -> dict[str, str]:
    """The text of every module by its name."""
    found = {}
    for package in (qnpu_jax, qnpu_sim):
        names = [package.__name__]
        names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        for name in names:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None
            found[name] = Path(spec.origin).read_text()
    return found


EXAMPLES = {name: text.count(MARK) for name, text in sources().items() if MARK in text}
"""Modules with examples, and how many lines of them begin one."""


class Finder(doctest.DocTestFinder):
    """Also finds what the import hook of conftest.py, or jax.jit, has wrapped."""

    def _from_module(self, module, object):
        with contextlib.suppress(ValueError):
            object = inspect.unwrap(object)
        return super()._from_module(module, object)  # type: ignore[misc]


def examples(module) -> list[doctest.DocTest]:
    return [test for test in Finder().find(module, module.__name__) if test.examples]


@pytest.fixture
def names(made, tmp_path, monkeypatch):
    """What the examples of the face speak of: a checkpoint, its integers, text; files lie in the
    working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    checkpoint = qnpu_jax.load("model")
    ids = checkpoint.tokenizer.encode((made / "text.txt").read_text())
    return {
        "qnpu": qnpu_jax,
        "checkpoint": checkpoint,
        "model": storage.load(made / "out"),
        "ids": ids[:PREFILL],
        "windows": [ids[:PREFILL], ids[PREFILL : 2 * PREFILL]],
    }


def test_there_are_examples():
    assert len(EXAMPLES) >= 15
    assert sum(EXAMPLES.values()) >= 40
    assert {"qnpu_jax.api.making", "qnpu_jax.recipes.recipe", "qnpu_sim.fixedpoint"} <= {*EXAMPLES}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, request):
    module = importlib.import_module(name)
    found = examples(module)
    assert sum(len(test.examples) for test in found) == EXAMPLES[name], "some were not found"
    face = name.startswith("qnpu_jax.api") or name == "qnpu_jax.models.checkpoint"
    more = request.getfixturevalue("names") if face else {}
    said: list[str] = []
    for test in found:
        test.globs |= more
        doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def test_an_example_that_is_wrong_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1


@pytest.mark.parametrize("name", qnpu_jax.__all__)
def test_the_face_is_documented(name):
    thing = getattr(qnpu_jax, name)
    if isinstance(thing, dict) or thing is qnpu_jax.UserError:
        return
    text = inspect.getdoc(thing)
    assert text and text.split("\n")[0].endswith(".")
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert "Raises" in sections and MARK in text
    assert ("Args" in sections) == bool(signature.parameters)
    assert ("Returns" in sections) == (signature.return_annotation not in (None, "None"))
    arguments = text.split("Args:\n")[1].split("\n\n")[0]
    for parameter in signature.parameters:
        assert parameter in arguments.replace(",", " ").replace(":", " ").split(), parameter
