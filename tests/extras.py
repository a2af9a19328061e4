"""Tests that an optional extra is needed for."""

from collections.abc import Callable

import pytest

from qnpu_jax.errors import UserError


def needs(check: Callable[[], object]) -> pytest.MarkDecorator:
    """Skips a test where `check` says that an extra is missing."""
    missing = ""
    try:
        check()
    except UserError as error:
        missing = str(error)
    return pytest.mark.skipif(bool(missing), reason=missing)
