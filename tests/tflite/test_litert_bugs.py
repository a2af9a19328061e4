"""The bugs that docs/litert-bugs.md tells of are there: a release that mends one is noticed."""

import importlib.util
import platform
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "docs" / "litert-bugs.py"
SPEC = importlib.util.spec_from_file_location("litert_bugs", PATH)
assert SPEC is not None and SPEC.loader is not None
bugs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bugs)


def has_avx512() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512f" in info.read_text()


@pytest.mark.parametrize("name", list(bugs.WRONG))
def test_a_wrong_result_is_still_wrong(name):
    if name in bugs.AVX512 and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("known of XNNPACK's kernels for x86 only")
    expected, got = bugs.WRONG[name]()
    right = name in bugs.AVX512 and not has_avx512()
    assert (got == expected) == right


@pytest.mark.slow
@pytest.mark.parametrize("name", list(bugs.FATAL))
def test_a_fatal_one_still_kills_the_process(name):
    assert bugs.dies(name) < 0, "by a signal"


def test_the_page_lists_each():
    page = PATH.with_suffix(".md").read_text()
    assert all(f"| `{name}` |" in page for name in (*bugs.WRONG, *bugs.FATAL))
