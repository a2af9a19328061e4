"""Packages that the optional extras bring: whether they are here, in a version that fits."""

from __future__ import annotations

from importlib import metadata

from qnpu_jax.errors import UserError


def remedy(extra: str) -> str:
    """How to install an extra, for the end of an error."""
    return f'install qnpu\'s extra "{extra}": pip install "qnpu[{extra}]"'


def version(package: str, extra: str) -> str:
    """Of a package of an extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{package}: not installed; {remedy(extra)}") from None


def check(package: str, wanted: str, extra: str) -> None:
    """Raises UserError where a package is missing, or its version does not begin with `wanted`."""
    got = version(package, extra)
    if not got.startswith(wanted):
        raise UserError(f"{package}: version {got}, expected {wanted}*; {remedy(extra)}")
