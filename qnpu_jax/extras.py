"""Optional packages, which extras of qnpu install: are they here, and in a version that fits?"""

from __future__ import annotations

from importlib import metadata

from qnpu_jax.errors import UserError


def remedy(extra: str) -> str:
    """Says how to install an extra, for the end of an error."""
    return f'install qnpu\'s extra "{extra}": pip install "qnpu[{extra}]"'


def version(package: str, extra: str) -> str:
    """Gives the version of a package of an extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{package}: not installed; {remedy(extra)}") from None


def check(package: str, wanted: str, extra: str) -> None:
    """Checks that a package of an extra is installed in a version that begins with `wanted`.

    Raises:
      UserError: it is missing, or has another version.
    """
    got = version(package, extra)
    if not got.startswith(wanted):
        raise UserError(f"{package}: version {got}, expected {wanted}*; {remedy(extra)}")
