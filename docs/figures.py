"""Draws docs/overview.svg and docs/widths.svg: `python docs/figures.py`.

The widths are read from the decoder as it is staged for each recipe, and listed in the drawing's
description, which tests/test_docs.py compares with today's. Needs matplotlib (extra `figures`).
"""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph import decoder
from qnpu_jax.recipes import RECIPES

DOCS = Path(__file__).parent
WIDTHS, OVERVIEW = DOCS / "widths.svg", DOCS / "overview.svg"
SHOWN = ("w8a8", "w4a8", "w8a8s8", "w8a8i8", "w8a16", "w4a16")
COLUMNS = {
    "embedding": "embed.weight",
    "residual stream": "layers.attn.residual",
    "norm": "layers.attn.norm.out",
    "input of q, k, v": "layers.attn.input",
    "weights": "layers.attn.q.weight",
    "q, k, v": "layers.attn.q",
    "RoPE": "layers.attn.rope.q_out",
    "KV cache": "layers.attn.k_cache",
    "scores": "layers.attn.kv0.scores",
    "softmax": "layers.attn.kv0.softmax",
    "probabilities": "layers.attn.kv0.probs",
    "mixed values": "layers.attn.kv0.mixed",
    "gate, up": "layers.mlp.gate",
    "input of down": "layers.mlp.act",
    "down": "layers.mlp.down",
    "head weights": "head.weight",
    "logits": "head.logits",
}
"""One tensor for each kind, in the order of the computation."""
COLOURS = {4: "#d5e8f4", 8: "#9ecae8", 16: "#e08a1e"}
"""Light to dark, blue to orange: told apart by all kinds of colour vision, and by lightness."""


def widths() -> list[str]:
    """Lines "recipe tensor bits", as the decoder is staged."""
    config = ModelConfig("llama", 64, 32, 48, 1, 2, 1, 16, 64)
    lines = []
    for recipe in SHOWN:
        graphs = decoder(config, RECIPES[recipe].bits, 8, 2).graphs
        bits = {g.prefix + t.name: t.quant.bits[0] for g in graphs for t in g.tensors if t.quant}
        lines += [f"{recipe} {name} {bits[name]}" for name in COLUMNS.values()]
    return lines


def drawn() -> list[str]:
    """The lines that the committed drawing lists."""
    return re.findall(r"^\w+ [\w.]+ \d+(?=\n|<)", unescape(WIDTHS.read_text()), flags=re.MULTILINE)


def draw_widths(target: Path) -> None:
    from matplotlib.figure import Figure

    lines = widths()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        row, column = divmod(i, len(COLUMNS))
        bits = int(line.split()[-1])
        axes.barh(row, 0.94, left=column + 0.03, height=0.9, color=COLOURS[bits])
        axes.text(column + 0.5, row, str(bits), ha="center", va="center", size=8)
    axes.set(xlim=(0, len(COLUMNS)), ylim=(len(SHOWN) - 0.5, -0.5))
    axes.set_yticks(range(len(SHOWN)), SHOWN)
    places = [i + 0.5 for i in range(len(COLUMNS))]
    axes.set_xticks(places, list(COLUMNS), rotation=40, ha="right", size=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, target, "Bits by recipe:\n" + "\n".join(lines))


STEPS = (
    ("float checkpoint", "GGUF or Hugging Face"),
    ("easier parameters", "norms folded, rotations merged,\noutlier tokens made a prefix"),
    ("scales", "calibrated, then learned\nagainst the float model"),
    ("integer model", "codes, scales, zero points:\nrounded once"),
)
"""From left to right: what a run makes, and how."""
WIDE, HIGH, STEP = 2.05, 0.8, 2.35
"""Of a box, and from one box to the next (inches)."""


def draw_overview(target: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = Figure(figsize=(5 * STEP + 0.1, 2.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-WIDE / 2 - 0.1, 4.5 * STEP + 0.05), ylim=(-1.15, 1.15))
    axes.axis("off")

    def box(x: float, y: float, title: str, says: str, colour: str) -> None:
        style = {"ha": "center", "va": "center"}
        corner = (x - WIDE / 2, y - HIGH / 2)
        shape = "round,pad=0,rounding_size=0.08"
        axes.add_patch(
            FancyBboxPatch(corner, WIDE, HIGH, boxstyle=shape, fc=colour, ec="#333333", lw=1)
        )
        axes.text(x, y + 0.2, title, weight="bold", size=10, **style)
        axes.text(x, y - 0.13, says, size=7.5, **style)

    def arrow(start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
        axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle=style, mutation_scale=11, color="#333333", shrinkA=0,
                shrinkB=0,
            )
        )  # fmt: skip

    for i, (title, says) in enumerate(STEPS):
        box(i * STEP, 0, title, says, "#d5e8f4" if i == len(STEPS) - 1 else "#eeeeee")
        if i:
            arrow(((i - 1) * STEP + WIDE / 2, 0), (i * STEP - WIDE / 2, 0))
    last, edge = 4 * STEP, 3 * STEP + WIDE / 2
    box(last, 0.68, "model.tflite", "run by LiteRT", "#f5c26b")
    box(last, -0.68, "simulator", "integers, in JAX", "#9ecae8")
    for y in (0.68, -0.68):
        arrow((edge, 0), (last - WIDE / 2, y))
    arrow((last, 0.68 - HIGH / 2), (last, -0.68 + HIGH / 2), "<|-|>")
    axes.text(last + 0.1, 0, "every element of\nevery tensor equal", size=8, va="center")
    save(figure, target, "From a float checkpoint to a proved integer file")


def save(figure, target: Path, description: str) -> None:
    about = {"Date": None} if target.suffix == ".svg" else {}
    figure.savefig(target, metadata={**about, "Description": description})


def main() -> None:
    import matplotlib as mpl

    mpl.rcParams.update({"svg.hashsalt": "qnpu", "svg.fonttype": "none", "font.family": "sans"})
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    suffix = ".png" if len(sys.argv) > 1 else ".svg"  # to look at
    draw_widths((folder / WIDTHS.name).with_suffix(suffix))
    draw_overview((folder / OVERVIEW.name).with_suffix(suffix))


if __name__ == "__main__":
    main()
