"""`python -m qnpu_jax.cli`."""

from qnpu_jax.cli import main

main()
