"""Strictness that tests have and production does not pay for.

Annotations of `qnpu_jax` and `qnpu_sim` are checked at every call (shapes included), JAX promotes
neither dtypes nor ranks, and warnings are errors (pyproject.toml). This file must not import either
package: the hook sees only later imports.
"""

import functools
import os
import shutil
import sys
from pathlib import Path

import flax.struct
import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of a jitted function compiles, so no deadline; a red run must be red again, so no
# random examples.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def _dataclass(cls=None, /, *, original=flax.struct.dataclass, **kwargs):
    """flax.struct.dataclass whose constructor goes unchecked; its methods do not.

    JAX rebuilds a pytree through its constructor with whatever a transformation puts in the leaves:
    None, a shape, a batched array, ShapeDtypeStruct. Field annotations describe the values that the
    code makes, not those.
    """
    if cls is None:
        return functools.partial(_dataclass, original=original, **kwargs)
    # What jaxtyping looks for on a dataclass; typing.no_type_check would mark the methods too.
    cls.__no_type_check__ = True
    return original(cls, **kwargs)


assert not {"qnpu_jax", "qnpu_sim"} & sys.modules.keys(), (
    "imported before the hook that checks them"
)
flax.struct.dataclass = _dataclass
jaxtyping.install_import_hook(["qnpu_jax", "qnpu_sim"], "beartype.beartype")

pytest_plugins = ["command"]  # imported after the hook


def pytest_collection_modifyitems(config, items):
    """Tests marked `nightly` or `exhaustive` run only where `-m` names the marker; an expression
    about another one (`-m 'not slow'`) does not bring them in."""
    rare = [m for m in ("nightly", "exhaustive") if m not in config.option.markexpr]
    left_out = [i for i in items if any(i.get_closest_marker(m) for m in rare)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in set(left_out)]
    items.sort(key=lambda item: item.path.name != LONGEST)  # or one process waits for it at the end


MOST_BYTES = 2**31
"""Of compiled programs that are kept from run to run."""
LONGEST = "test_real_model.py"
"""Runs first: with whole files per process, the others share what is left evenly."""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist: by number of tests, longest last
        config.option.loadscopereorder = False
    _keep_compiled(config)


def _keep_compiled(config):
    """What one process has compiled, no other compiles again, nor the next run.

    The key is the program, its compiler and the processor. JAX does not write a file at one stroke:
    who reads half of one warns, and compiles (pyproject.toml lets that warning pass).
    """
    folder = config.cache.mkdir("compiled")
    first = "PYTEST_XDIST_WORKER" not in os.environ
    if first and sum(p.stat().st_size for p in folder.iterdir()) > MOST_BYTES:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """A compiled program holds a dozen memory maps as long as a cache holds it, and Linux gives a
    process 65,530: past them, XLA's compiler ends the process with a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:  # no module adds as many again
        jax.clear_caches()
