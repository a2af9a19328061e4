"""Typed values of a model's configuration: of config.json, or of a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Fields:
    """Values by key, and what an error about one of them says.

    Attributes:
      data: values by key; a key whose value is null is absent.
      where: the file.
      prefix: what stands before every key in the file, in messages only.
      way_out: what to do about a bad value.
    """

    data: Mapping[str, Any]
    where: str
    prefix: str = ""
    way_out: str = "correct it"

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def bad(self, key: str, expected: str, way_out: str | None = None) -> UserError:
        """Makes the error of a key whose value is not what is expected."""
        return UserError(
            f"{self.where}: {self.prefix}{key} must be {expected}; got {self.get(key)!r};"
            f" {way_out or self.way_out}"
        )

    def count(self, key: str, default: int | None = None) -> int:
        """Reads a positive integer."""
        got = self.get(key, default)
        if not isinstance(got, int) or isinstance(got, bool) or got < 1:
            raise self.bad(key, "a positive integer")
        return got

    def real(self, key: str, default: float | None = None) -> float:
        """Reads a positive number."""
        got = self.get(key, default)
        if not is_real(got) or got <= 0:
            raise self.bad(key, "a positive number")
        return float(got)

    def reals(self, key: str) -> tuple[float, ...]:
        """Reads a list of positive numbers."""
        got = self.get(key)
        if not isinstance(got, list) or not all(is_real(x) and x > 0 for x in got):
            raise self.bad(key, "a list of positive numbers")
        return tuple(map(float, got))

    def flag(self, key: str, default: bool = False) -> bool:
        """Reads true or false."""
        got = self.get(key, default)
        if not isinstance(got, bool):
            raise self.bad(key, "true or false")
        return got


def is_real(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
