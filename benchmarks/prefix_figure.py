"""Draws the largest token over the median one, layer by layer, without and with the prefix.

python benchmarks/prefix_figure.py out/ benchmarks/figures/prefix.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from qnpu_jax.transform.prefix_trials import OUTLIER_RATIO


def draw(report: dict, target: Path) -> None:
    prefix = report["prefix"]
    mpl.rcParams["svg.hashsalt"] = "qnpu"  # equal bytes for equal numbers
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    layers = range(len(prefix["before"]))
    axes.semilogy(layers, prefix["before"], "o-", ms=3, label="without prefix")
    axes.semilogy(layers, prefix["after"], "o-", ms=3, label=f"prefix {list(prefix['tokens'])}")
    axes.axhline(OUTLIER_RATIO, color="gray", lw=0.8, ls="--", label=f"limit {OUTLIER_RATIO:.0f}")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest token / median token")
    axes.set_title(f"{report['model']}: massive activations", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        report = json.loads((Path(sys.argv[1]) / "report.json").read_text())
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not report.get("prefix"):
        print(f"{sys.argv[1]}: this model has no prefix; nothing to draw", file=sys.stderr)
        return 2
    draw(report, Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
