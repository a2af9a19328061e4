"""Widths that a model's tensors ask of each other, as data: what moves when one is set by hand.

A kernel gives no fewer bits than it takes, unless it is a requantize; movement ops copy codes; what
reads one shared input in a layer has one width. `qnpu_jax.plan.ties` finds all of it for a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

from qnpu_jax.errors import UserError, nearest

WIDE_BIAS, NARROW_BIAS = 64, 32
"""Bits of a linear's bias beside an output of 16 bits, and of 8."""


@dataclass(frozen=True)
class Ties:
    """Tensors of a model by global name, and what their widths ask of each other.

    Attributes:
      names: tensors whose bits a plan decides.
      copies: tensors whose bits it does not decide, with the one of `names` that does for them.
      same: sets of `names` of one width.
      above: pairs (a, b): b has no fewer bits than a.
      widths: bits that kernels have, for each of `names`.
      biases: output of the linear of each bias.
      constant: bits of tensors that have them whatever a plan says.
    """

    names: tuple[str, ...]
    copies: Mapping[str, str]
    same: tuple[tuple[str, ...], ...]
    above: tuple[tuple[str, str], ...]
    widths: Mapping[str, tuple[int, ...]]
    biases: Mapping[str, str]
    constant: Mapping[str, int]

    def named(self, pattern: str) -> list[str]:
        """The tensors of `names` that a name or a shell-style pattern means; of a copy its source.

        Raises:
          UserError: none; says the nearest names. Or one whose bits no plan decides.
        """
        matches = re.compile(translate(pattern)).match
        found = [n for n in self.names if matches(n)]
        found += [source for name, source in self.copies.items() if matches(name)]
        if not found:
            for constant, bits in self.constant.items():
                if matches(constant):
                    raise UserError(f"{constant}: has {bits} bits wherever it is; leave it out")
            raise UserError(
                f"{pattern}: no tensor of the model; expected a name like layers.0.mlp.act, or a"
                " pattern; `qnpu graph` prints every name" + nearest(pattern, self.names)
            )
        return list(dict.fromkeys(found))

    def moved(self, now: Mapping[str, int], asked: Mapping[str, int]) -> dict[str, int]:
        """Finds the bits of all tensors that change: those asked for, what has to follow, and the
        biases of linears among them.

        A raised tensor raises what is made of it, up to the next requantize; a lowered one lowers
        what it is made of, down to the last one.

        Args:
          now: bits of each of `names`.
          asked: bits of some.

        Raises:
          UserError: bits that no kernel has, or that do not go together.
        """
        then = self._fixed(now, asked)
        fixed = frozenset(then)
        for sign, after in ((1, self._raised_with), (-1, self._lowered_with)):
            todo = [n for n, b in then.items() if self._off(n, now, b, sign)]
            while todo:
                one = todo.pop()
                for other in after.get(one, ()):
                    free = other not in fixed and then.get(other) != then[one]
                    if free and self._off(other, now, then[one], sign):
                        then[other] = then[one]
                        todo.append(other)
        self._check(now, then)
        found = {n: bits for first, bits in then.items() for n in self._set_of[first]}
        for bias, linear in self.biases.items():
            if linear in found and bias not in asked:
                found[bias] = WIDE_BIAS if found[linear] > 8 else NARROW_BIAS
        found |= {n: bits for n, bits in asked.items() if n in self.biases}
        return {n: bits for n, bits in found.items() if now[n] != bits}

    def patterns(
        self, names: Collection[str], also: Collection[str] = (), known: Iterable[str] = ()
    ) -> list[str]:
        """Shell-style patterns that match these of `names`, and no others but `also`: few, and
        `known` ones first."""
        left, allowed = set(names), {*names, *also}
        found: list[str] = []
        for tier in range(4):
            candidates = dict.fromkeys(known if tier == 0 else ())
            for name in self.names if tier else ():
                if name in left:
                    candidates |= dict.fromkeys(_candidates(name, tier))
            reached = {p: self._matched(p) for p in candidates}
            usable = {p: hit for p, hit in reached.items() if hit <= allowed}
            gain = {p: (-len(hit & left), len(hit), -p.count(".")) for p, hit in usable.items()}
            for pattern in sorted(usable, key=gain.__getitem__):
                if usable[pattern] & left:
                    found.append(pattern)
                    left -= usable[pattern]
        return found

    def _matched(self, pattern: str) -> set[str]:
        return set(filter(re.compile(translate(pattern)).match, self.names))

    @cached_property
    def _set_of(self) -> dict[str, tuple[str, ...]]:
        """Tensors of one width, by the first of them."""
        inside = {n for group in self.same for n in group}
        alone = {n: (n,) for n in self.names if n not in inside}
        return alone | {group[0]: group for group in self.same}

    @cached_property
    def _first(self) -> dict[str, str]:
        return {n: first for first, group in self._set_of.items() for n in group}

    @cached_property
    def _raised_with(self) -> dict[str, list[str]]:
        """Sets that must rise with a set, as they are made of it; by first tensors."""
        return _listed((self._first[a], self._first[b]) for a, b in self.above)

    @cached_property
    def _lowered_with(self) -> dict[str, list[str]]:
        """Sets that must fall with a set, as it is made of them; by first tensors."""
        return _listed((self._first[b], self._first[a]) for a, b in self.above)

    def _off(self, first: str, now: Mapping[str, int], bits: int, sign: int) -> bool:
        """Whether a set has fewer bits than these (sign 1), or more (-1)."""
        return any(sign * now[n] < sign * bits for n in self._set_of[first])

    def _fixed(self, now: Mapping[str, int], asked: Mapping[str, int]) -> dict[str, int]:
        """The widths asked for, by the first tensor of each set."""
        wanted = dict(asked)
        for bias, linear in self.biases.items():
            if asked.get(bias) == WIDE_BIAS and now[linear] < 16:
                wanted.setdefault(linear, 16)  # beside 8 bits a kernel reads it as 32
                if wanted[linear] < 16:
                    raise _clash(bias, WIDE_BIAS, linear, wanted[linear])
        then: dict[str, int] = {}
        by: dict[str, str] = {}
        for name, bits in wanted.items():
            if bits not in self.widths[name]:
                raise UserError(
                    f"{name}: {bits} bits; expected {' or '.join(map(str, self.widths[name]))}, as"
                    " kernels have no other width for it or what shares its codes; correct it"
                )
            first = self._first[name]
            if then.setdefault(first, bits) != bits:
                raise _clash(by[first], then[first], name, bits)
            by.setdefault(first, name)
        return {first: bits for first, bits in then.items() if first not in self.biases}

    def _check(self, now: Mapping[str, int], then: Mapping[str, int]) -> None:
        """Raises UserError where what changes does not go together, or has a width of no kernel."""
        for a, b in self.above:
            first, second = self._first[a], self._first[b]
            if first in then or second in then:
                before, after = then.get(first, now[a]), then.get(second, now[b])
                if before > after:
                    raise _clash(a, before, b, after)
        for first, bits in then.items():
            if bits not in self.widths[first]:
                raise UserError(
                    f"{first}: it would have to move to {bits} bits too; expected"
                    f" {' or '.join(map(str, self.widths[first]))}, as kernels have no other width"
                    " for it; leave what it follows as it is"
                )


def _listed(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Lists the second names of pairs by the first."""
    found: dict[str, list[str]] = {}
    for a, b in pairs:
        found.setdefault(a, []).append(b)
    return found


def _clash(a: str, bits: int, b: str, other: int) -> UserError:
    return UserError(
        f"{a} at {bits} bits and {b} at {other} do not go together: no kernel gives fewer bits"
        " than it takes, and what is copied or shared has one width; set one of them otherwise"
    )


def _candidates(name: str, tier: int) -> Iterator[str]:
    """Patterns that match a name: of all layers (tier 1), of its layer or KV head (2), the name
    itself (3)."""
    all_heads = re.sub(r"\.kv\d+\.", ".kv*.", name)
    all_layers = re.sub(r"^layers\.\d+\.", "layers.*.", all_heads)
    one_head = re.sub(r"^layers\.\d+\.", "layers.*.", name)
    if tier == 1:
        yield f"*.{name.rpartition('.')[2]}"
        yield from _scopes(all_layers)
    elif tier == 2:
        yield from _scopes(all_heads)
        yield one_head
    else:
        yield name


def _scopes(pattern: str) -> Iterator[str]:
    """The pattern, and those of everything in its scopes, blocks and smaller ones."""
    yield pattern
    parts = pattern.split(".")
    for n in range(3, len(parts)):
        yield ".".join([*parts[:n], "*"])
