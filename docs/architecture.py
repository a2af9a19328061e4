"""Draws docs/architecture.svg from the imports: `python docs/architecture.py`.

Levels and imports are read from tests/test_imports.py, which holds them. An arrow a -> b says that
a imports b; arrows that a longer way implies are left out (transitive reduction). The arrows are
also listed in the drawing's description, one a line, which tests/test_docs.py compares with today's
imports: a drawing that is out of date fails there.

Needs matplotlib (extra `figures`) to draw, and pytest, which tests/test_imports.py imports.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Mapping
from html import unescape
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent
DRAWING = ROOT / "docs" / "architecture.svg"
sys.path.insert(0, str(ROOT / "tests"))
import test_imports as held  # noqa: E402

ARROW = " -> "
PLUMBING = ("errors", "choices", "heap", "artifacts", "extras", "progress")
"""Files that much imports and that say nothing about the structure: listed, without arrows."""
DEFINITION, READERS = ("graph",), ("fakequant", "calibrate", "qnpu_sim", "tflite")
COLOURS = {"definition": "#f5c26b", "reader": "#9ecae8", "other": "#eeeeee"}
"""Orange and blue are told apart by all kinds of colour vision, and by lightness."""
LEGEND = """arrow: imports (those that others imply are left out)
orange: the definition; blue: its readers; white: files
number: level; a folder imports from lower ones only"""
WIDTH, HEIGHT, GAP, BEND, ROW = 2.15, 0.6, 0.3, 0.3, 1.1
"""Of a box, between boxes, of an arrow between boxes, from level to level (inches)."""


def needs() -> dict[str, frozenset[str]]:
    """The folders and root files that each imports, directly."""
    found: dict[str, set[str]] = {name: set() for name in held.LEVELS if name != "__init__"}
    for module in held.FILES:
        above = held.top(module)
        for other, _ in held.imports(module):
            below = held.top(other)
            if below != above and "__init__" not in (above, below):
                found[above].add(below)
    return {name: frozenset(others) for name, others in found.items()}


def reached(name: str, need: Mapping[str, frozenset[str]]) -> set[str]:
    """All that `name` imports, directly or not."""
    return set(need[name]).union(*(reached(other, need) for other in need[name]))


def edges() -> list[str]:
    """The arrows "a -> b" that no longer way implies, sorted."""
    need = needs()
    return sorted(
        f"{above}{ARROW}{below}"
        for above, others in need.items()
        for below in others
        if not any(below in reached(other, need) for other in others)
    )


def drawn() -> list[str]:
    """The arrows that the committed drawing lists."""
    text = unescape(DRAWING.read_text())
    return re.findall(rf"^\w+{ARROW}\w+(?=\n|<)", text, flags=re.MULTILINE)


def purpose(name: str) -> str:
    """The sentence that a folder's `__init__` begins with; empty for a file."""
    path = held.FILES.get(name if name == "qnpu_sim" else f"qnpu_jax.{name}")
    if path is None or path.name != "__init__.py":
        return ""
    says = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s", " ".join(says.split()))[0].rstrip(".")


def chains(arrows: list[tuple[str, str]]) -> list[list[str]]:
    """Each arrow as a way down through every level between: names, and "a>b@level" for a bend."""
    level = held.LEVELS
    return [[a, *(f"{a}>{b}@{n}" for n in range(level[a] - 1, level[b], -1)), b] for a, b in arrows]


def rows(ways: list[list[str]]) -> list[list[str]]:
    """Boxes and bends by level, from the lowest, ordered so that few arrows cross: each lies at the
    mean place of what it is joined to (Sugiyama's barycentre method)."""
    names = {name for name in held.LEVELS if name != "__init__"} | {n for w in ways for n in w}
    found = [
        sorted(n for n in names if at_level(n) == level)
        for level in sorted({at_level(n) for n in names})
    ]
    joined: dict[str, list[str]] = {name: [] for name in names}
    for way in ways:
        for above, below in pairwise(way):
            joined[above].append(below)
            joined[below].append(above)
    place: dict[str, float] = {}
    for _ in range(40):
        for row in found:
            place |= dict(zip(row, abscissas(row), strict=True))
        for row in found:
            row.sort(key=lambda n: (mean([place[m] for m in joined[n]] or [place[n]]), n))
            place |= dict(zip(row, abscissas(row), strict=True))
    return found


def at_level(name: str) -> int:
    return int(name.split("@")[1]) if "@" in name else held.LEVELS[name]


def abscissas(row: list[str]) -> list[float]:
    """Where a row's boxes and bends have their middles, the row centred at 0."""
    widths = [BEND if "@" in name else WIDTH + GAP for name in row]
    ends = list(accumulate(widths))
    return [end - width / 2 - ends[-1] / 2 for end, width in zip(ends, widths, strict=True)]


def box(axes, name: str, at: tuple[float, float]) -> None:
    """A box centred `at`: the name and, of a folder, its purpose."""
    from matplotlib.patches import FancyBboxPatch

    kind = "definition" if name in DEFINITION else "reader" if name in READERS else "other"
    says = textwrap.wrap(purpose(name).replace("`", ""), 40)
    folder = bool(says)
    axes.add_patch(
        FancyBboxPatch(
            (at[0] - WIDTH / 2, at[1] - HEIGHT / 2), WIDTH, HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08", zorder=2,
            fc=COLOURS[kind] if folder else "white", ec="#333333", lw=1.2 if folder else 0.7,
        )
    )  # fmt: skip
    up = 0.17 if says else 0
    label = "qnpu_sim (sim/)" if name == "qnpu_sim" else f"{name}/" if folder else f"{name}.py"
    style = {"ha": "center", "va": "center", "zorder": 3}
    axes.text(at[0], at[1] + up, label, weight="bold", size=9, **style)
    axes.text(at[0], at[1] - 0.12, "\n".join(says), size=6.2, linespacing=1.1, **style)


def arrow(axes, points: list[tuple[float, float]]) -> None:
    """A way from the foot of the first box past the bends to the head of the last."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    (x, y), *bends, (x2, y2) = points
    way = [(x, y - HEIGHT / 2)]
    for bend_x, bend_y in bends:  # upright beside the boxes of its level
        way += [(bend_x, bend_y + HEIGHT / 2), (bend_x, bend_y - HEIGHT / 2)]
    way.append((x2, y2 + HEIGHT / 2))
    axes.add_patch(
        FancyArrowPatch(
            path=Curve(way), arrowstyle="-|>", mutation_scale=9, color="#555555", lw=0.9, zorder=1
        )
    )


def draw(target: Path) -> None:
    """Writes the picture; its bytes depend on the imports and on matplotlib's version alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "qnpu", "svg.fonttype": "none", "font.family": "sans"})
    arrows = [(a, b) for a, b in (e.split(ARROW) for e in edges()) if b not in PLUMBING]
    ways = chains(arrows)
    levels = rows(ways)
    at = {
        name: (x, level * ROW)
        for level, row in enumerate(levels)
        for name, x in zip(row, abscissas(row), strict=True)
    }
    half = max(abs(x) for x, _ in at.values()) + WIDTH / 2
    figure = Figure(figsize=(2 * half + 0.7, len(levels) * ROW + 0.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-half - 0.5, half + 0.2), ylim=(-0.5, len(levels) * ROW - 0.4))
    axes.axis("off")
    for level in range(len(levels)):
        axes.text(-half - 0.3, level * ROW, f"{level}", size=8, color="#777777", va="center")
    for name, place in at.items():
        if "@" not in name:
            box(axes, name, place)
    for way in ways:
        arrow(axes, [at[name] for name in way])
    axes.text(-half, -0.15, LEGEND, size=8, va="center", linespacing=1.5)
    description = "Imports between folders, reduced transitively:\n" + "\n".join(edges())
    about = {"Date": None} if target.suffix == ".svg" else {}
    figure.savefig(target, metadata={**about, "Description": description})


if __name__ == "__main__":
    draw(DRAWING)
    if len(sys.argv) > 1:  # a picture to look at
        draw(Path(sys.argv[1]))
