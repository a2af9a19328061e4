"""`python -m qnpu_jax.cli`."""

from __future__ import annotations

from qnpu_jax.cli import main

main()
