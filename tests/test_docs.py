"""The pages are true: links, paths, names and commands in them exist; drawings are of today."""

import functools
import importlib.util
import json
import re
import shlex
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
import tiny
import typer
from typer.exceptions import TyperException
from workspace import write_tiny_model

from qnpu_jax.cli.commands import app
from qnpu_jax.config import BitPlan
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.recipes import RECIPES

ROOT = Path(__file__).parent.parent
HISTORY = sorted(ROOT.glob("benchmarks/history/*.md"))
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += [*sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md", *HISTORY]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
IMAGE_OR_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATHS = re.compile(r"(?:tests|docs|benchmarks|qnpu_jax|sim)/[\w./-]+\.\w+")
NAMES = re.compile(r"(?:qnpu_jax|qnpu_sim)(?:\.\w+)+")


def named(pages: list[Path]) -> dict[str, Path]:
    return {str(page.relative_to(ROOT)): page for page in pages}


@functools.cache
def text(page: Path) -> str:
    return page.read_text()


def code(page: Path) -> list[str]:
    """The fenced blocks and the spans of a page."""
    blocks = [body for _, body in FENCE.findall(text(page))]
    spans = [" ".join(s.split()) for s in SPAN.findall(FENCE.sub("", text(page)))]
    return blocks + spans


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in IMAGE_OR_LINK.findall(FENCE.sub("", text(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("name", named(PAGES))
def test_links_lead_somewhere(name):
    assert broken(named(PAGES)[name]) == []


def test_a_link_to_nowhere_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Two words\n[a](#two-words) [b](page.md#three) ![c](c.svg) [d](page.md)\n")
    assert broken(page) == ["page.md#three", "c.svg"]


@pytest.mark.parametrize("name", named(PAGES))
def test_files_named_are_there(name):
    found = {path for part in code(named(PAGES)[name]) for path in PATHS.findall(part)}
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or what a module holds."""
    head, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        pass
    return bool(head) and exists(head) and hasattr(importlib.import_module(head), last)


@pytest.mark.parametrize("name", named(PAGES))
def test_modules_and_what_they_hold_are_there(name):
    parts = code(named(PAGES)[name])
    if name == "CHANGELOG.md":  # what was is told there too
        parts = [part for part in parts if not part.startswith("from ")]
    found = {dotted for part in parts for dotted in NAMES.findall(part)}
    assert [dotted for dotted in sorted(found) if not exists(dotted)] == []


def test_a_wrong_name_is_noticed():
    assert exists("qnpu_jax.graph.ops.Op") and exists("qnpu_sim.Npu")
    assert not exists("qnpu_jax.graph.ops.Ops") and not exists("qnpu_jax.freeze")


def command_lines(page: Path) -> list[str]:
    """Command lines of a page that begin with `qnpu`; of `a|b` each choice by itself."""
    lines = [re.sub(r"^[$>] ", "", line) for part in code(page) for line in part.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = []
    for part in parts:
        words = [w.replace("\\|", "|").split("|") for w in part.split(" > ")[0].split()]
        if words[:1] == [["qnpu"]] and len(words) > 1:
            found += [" ".join(choice) for choice in product(*words)]
    return found


def parse(line: str) -> None:
    """Parses a command line as `qnpu` would, and runs nothing. A line that is a part of one, as
    `qnpu compile --soc SM8650` in a sentence, may lack what is required.

    Raises:
      TyperException: no such command or option, or not such a value.
    """
    group: Any = typer.main.get_command(app)
    name, *words = shlex.split(line)[1:]
    context = group.make_context("qnpu", ["--help"], resilient_parsing=True)
    command = group.get_command(context, name)
    if name in {option for p in group.get_params(context) for option in p.opts}:
        return
    if command is None:
        raise TyperException(f"{name}: no such command")
    for _ in range(3):
        try:
            command.make_context(name, list(words), parent=context)
        except TyperException as error:
            if type(error).__name__ != "MissingParameter":  # a class that typer keeps to itself
                raise
            required = vars(error)["param"]
            words += ["x"] if required.param_type_name == "argument" else [required.opts[0], "x"]
        else:
            return


CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page not in HISTORY]
LINES = {line: page for page in CURRENT for line in command_lines(page)}


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line):
    parse(line)


def test_a_wrong_command_line_is_noticed():
    for line in ("qnpu verify out --kernel ref", "qnpu bench out --rounds many", "qnpu prove out"):
        with pytest.raises(TyperException):
            parse(line)
    assert len(LINES) > 25


def script(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_is_drawn_as_it_is():
    architecture = script("architecture")
    assert architecture.drawn() == architecture.edges(), "run `python docs/architecture.py`"


def test_widths_are_drawn_as_they_are():
    figures = script("figures")
    assert figures.drawn() == figures.widths(), "run `python docs/figures.py`"


def test_the_rules_of_ones_own_recipe_are_taken():
    """What docs/recipes.md puts at the top of a plan gives a graph, of those widths."""
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## One's own")[2]
    rules = json.loads("[" + re.findall(r"`(\[\"layers.*?)` gives", page, re.S)[0] + "]")
    plan = BitPlan((*map(tuple, rules), *RECIPES["w4a8"].bits.rules))
    layer = decoder(tiny.SMOLLM2, plan, 8).layer
    for name in ("mlp.act", "mlp.down"):
        assert layer[name].quant.bits == (16, *[8] * 29)


def test_bits_set_by_hand_as_the_page_does(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## One's own")[2]
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert example.count('"smollm2-135m"') == 1
    write_tiny_model(tmp_path / "model", layers=4)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace('"smollm2-135m"', '"model"'), names)
    config = names["qnpu"].load("model").config
    layer = decoder(config, names["bits"], 8).layer
    for name in ("mlp.act", "mlp.down"):
        assert layer[name].quant.bits == (8, 8, 16, 8)
