"""A text of Python code to calibrate and learn on: the sources of installed packages.

The judged code (the standard library's) is not among them. The same versions give the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

from qnpu_jax.errors import UserError

CHARACTERS = 1_000_000
_LEFT_OUT = {"tests", "testing", "__config__.py"}  # the last tells of the build


def sources(package: str, characters: int) -> str:
    """The package's modules in the order of their paths, but for tests, cut at a length."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package}: not installed; pip install it, or name another")
    root, parts, size = Path(spec.origin).parent, [], 0
    for path in sorted(root.rglob("*.py")):
        if size >= characters:
            break
        if not _LEFT_OUT & {*path.relative_to(root).parts}:
            parts.append(path.read_text("utf-8"))
            size += len(parts[-1])
    return "\n\n".join(parts)[:characters]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", nargs="+", default=["numpy", "optax"])
    args = parser.parse_args()
    try:
        text = "\n\n".join(sources(p, CHARACTERS // len(args.packages)) for p in args.packages)
        args.out.write_text(text, "utf-8")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    digest = hashlib.sha256(text.encode()).hexdigest()
    versions = ", ".join(f"{p} {version(p)}" for p in args.packages)
    print(f"wrote {args.out}: {len(text):,} characters of {versions}, SHA-256 {digest[:12]}...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
