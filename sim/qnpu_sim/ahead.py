"""Compilation of a model's programs side by side, before the first of them runs.

A model of mixed precision has a program for each pattern of bits. XLA compiles one program mostly
on one thread, so that patterns compiled where they are first met take as long as all together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


def compile_ahead(function: Any, calls: Sequence[tuple[Any, ...]]) -> None:
    """Compiles a function of `jax.jit` for several calls with 64-bit types, one on each processor
    at a time.

    What is compiled stays in the function's own cache, where a call with such arguments finds it.

    Args:
      calls: arguments of each; arrays may be `jax.ShapeDtypeStruct`.
    """
    config: Any = jax.config
    precision, device = config.jax_default_matmul_precision, config.jax_default_device

    def compile_one(args: tuple[Any, ...]) -> None:
        # What is set for a block of code is set for its thread alone, and is part of the key.
        with (
            jax.enable_x64(),
            jax.default_matmul_precision(precision),
            jax.default_device(device),
        ):
            function.lower(*args).compile()

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        list(pool.map(compile_one, calls))
    finally:  # an interrupt waits for what is being compiled, not for what is still to be
        pool.shutdown(cancel_futures=True)
