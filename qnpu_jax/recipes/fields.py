"""Fields of the dataclasses that users write: every value checked, in code as in JSON.

A field's type and its metadata (`within`, `chosen`) say what it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from qnpu_jax.config import RULES, BitPlan, are_rules, wrong
from qnpu_jax.errors import UserError

T = TypeVar("T")

LARGEST = 2**31 - 1


def within(low: int | float, high: int | float, default: Any = dataclasses.MISSING) -> Any:
    """A number from `low` to `high`, without a default a required one."""
    return field(default=default, metadata={"low": low, "high": high})


def chosen(names: tuple[str, ...]) -> Any:
    """A tuple of some of these names, alone or each with a rate; by default of none."""
    return field(default=(), metadata={"names": names})


def read(kind: type[T], data: Any, source: str) -> T:
    """Reads a dataclass from JSON, every key and value checked.

    Args:
      source: the file, and where in it, for messages.

    Raises:
      UserError: an unknown key, a missing one, or a value that its field does not take.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(data).__name__}; correct it")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(
                f"{source}: unknown key {key!r}; expected one of {sorted(fields)}; remove or"
                " correct it"
            )
    for key, f in fields.items():
        if key not in data and f.default is dataclasses.MISSING:
            raise UserError(
                f"{source}: key {key!r} is missing; add it (see `qnpu recipe w8a8` for an example)"
            )
    values = _checked(kind, data, source)
    try:
        return kind(**values)
    except UserError as error:  # of values that do not go together
        raise UserError(f"{source}: {error}") from None


def check(made: Any) -> None:
    """Raises UserError for a value that its field does not take; lists become tuples.

    Every dataclass of this folder calls it in its `__post_init__`.
    """
    kind = type(made)
    for key, value in _checked(kind, vars(made), kind.__name__).items():
        object.__setattr__(made, key, value)


def _checked(kind: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    return {
        k: _value(hints[k], fields[k].metadata, value, f"{source}: {k}")
        for k, value in values.items()
    }


_hints = functools.cache(typing.get_type_hints)


def _value(hint: Any, limits: Mapping[str, Any], value: Any, where: str) -> Any:
    """One value of the type that the field declares, within its limits.

    Args:
      where: source and key, for messages.
    """
    if hint is BitPlan:
        return _plan(value, where)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise _refused(where, f"one of {list(choices)}", value)
        return value
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint)[0], limits, value, where)
    if hint is str or hint is bool:
        if not isinstance(value, hint) or (isinstance(value, str) and not value.isprintable()):
            raise _refused(where, "printable text" if hint is str else "true or false", value)
        return value
    whole = hint is int
    low, high = limits["low"], limits["high"]
    number = isinstance(value, numbers.Integral if whole else numbers.Real)
    if not number or isinstance(value, bool) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise _refused(where, f"{kind} from {low} to {high}", value)
    return hint(value)


def _refused(where: str, expected: str, got: Any) -> UserError:
    return UserError(f"{where} must be {expected}; got {got!r}; correct it")


def _plan(value: Any, where: str) -> BitPlan:
    if isinstance(value, BitPlan):
        return value
    if not are_rules(value):
        raise UserError(f"{where} must be {RULES}; got {wrong(value)}; correct it")
    return BitPlan(tuple((pattern, bits) for pattern, bits in value))


def _tuple(item: Any, limits: Mapping[str, Any], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple of dataclasses, of names, or of names each with a rate."""
    listed = isinstance(value, list | tuple)
    if isinstance(item, type) and dataclasses.is_dataclass(item):
        if not listed:
            raise _refused(where, f"a list of {item.__name__.lower()}s", value)
        found = enumerate(value)
        return tuple(x if isinstance(x, item) else read(item, x, f"{where}[{i}]") for i, x in found)
    names = list(limits["names"])
    if item is str:
        if not listed or any(x not in names for x in value):
            raise _refused(where, f"a list of groups of {names}", value)
        return tuple(value)
    if not listed or not all(map(_is_rate, value)):
        raise _refused(where, "a list of [group, learning rate above 0]", value)
    given = [name for name, _ in value]
    for name in given:
        if name not in names:
            raise UserError(f"{where} must name groups of {names}; got {name!r}; correct it")
        if given.count(name) > 1:
            raise UserError(f"{where} names {name!r} twice; correct it")
    return tuple((name, float(rate)) for name, rate in value)


def _is_rate(x: Any) -> bool:
    """Whether this is a name with a finite number above 0."""
    if not isinstance(x, list | tuple) or len(x) != 2 or not isinstance(x[0], str):
        return False
    number = isinstance(x[1], numbers.Real) and not isinstance(x[1], bool)
    return number and 0 < float(x[1]) < float("inf")
