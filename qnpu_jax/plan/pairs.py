"""Pair terms of the KL divergence: what two groups cost together beyond what each costs alone.

With all errors fixed, f(t) = KL(float || mixed) grows with the square of errors, so that

    f(t) = f(t0) + sum_i b_i t_i + sum_(i,j) h_ij t_i t_j,    h_ij = d2f / dt_i dt_j

where b_i is what group i costs alone. The charge a_i of `charges` holds half of each of its pair
terms: b_i = a_i - 1/2 sum_j h_ij. Terms are measured within a layer and to the next one, others
count as 0: errors that lie further apart have little to do with each other.

A product of the Hessian with a direction v gives all terms with the groups in v. Groups of one kind
of every third layer go into one v: what they share with a layer beside them comes from one of them
alone. Second derivatives are taken at (t0 + t) / 2, halfway along the path of the charges.

Reference: Janizek et al., Explaining Explanations: Axiomatic Feature Interactions for Deep Networks
(arXiv 2002.04138), whose integral over the path is taken here at its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, Tensors
from qnpu_jax.plan.charges import (
    Arrays,
    Mixed,
    all_raised,
    arrays,
    divergence,
    factors,
    rounded_pass,
)
from qnpu_jax.plan.groups import Choices

APART = 3
"""Layers from one group of a direction to the next: one on either side, and the layer itself."""


class Pair(NamedTuple):
    """Two groups by number, i < j, with their term h_ij (nats per position)."""

    i: int
    j: int
    term: float


@dataclass(frozen=True)
class Losses:
    """Predicted KL of every plan (nats per position): that of raising all, own terms, pair terms.

    Attributes:
      base: f(t0), all groups raised.
      own: by group, its charge less half of its pair terms with groups that were low beside it.
      pairs: those that are more than noise; none for charges alone.
    """

    base: float
    own: Float64[np.ndarray, " g"]
    pairs: tuple[Pair, ...] = ()

    def predicted(self, raised: Sequence[bool]) -> float:
        """Predicts f at a plan."""
        low = ~np.asarray(raised, bool)
        both = sum(p.term for p in self.pairs if low[p.i] and low[p.j])
        return self.base + float(self.own[low].sum()) + both

    def charged(self, charges: Float64[np.ndarray, " g"], raised: Sequence[bool]) -> Losses:
        """Takes charges measured at a plan in place of the old ones, of the groups low there.

        A charge below 0 counts as 0: low bits do not help, they were lucky.
        """
        low = ~np.asarray(raised, bool)
        own = np.where(low, np.maximum(charges, 0.0), self.own)
        for i, j, term in self.pairs:
            if low[i] and low[j]:
                own[[i, j]] -= term / 2
        return Losses(self.base, own, self.pairs)


def pair_terms(
    model: Mixed,
    windows: Int[np.ndarray, "n t"],
    references: Sequence[Float[Array, "t v"]],
    raised: Sequence[bool],
) -> Float64[np.ndarray, "n p"]:
    """Measures the terms of all `neighbours`, window by window, at a plan.

    Args:
      references: logits of the float model after its prefix, for each window.
      raised: the plan, by group; terms of raised groups are 0.
    """
    found, at = model.choices, factors(model.choices, raised)
    beside, every = neighbours(found), directions(found)
    sources = {i: v for v in every for i in v}
    rows = []
    for ids, reference in zip(windows, references, strict=True):
        read = arrays(model, ids)
        _, errors = rounded_pass(found.low, read, at)
        fixed = read._replace(errors=read.errors | errors)
        products = {v: _product(found, fixed, reference, at, v) for v in every}
        # Each term is there twice, from either of its groups: their mean.
        rows.append([(products[sources[i]][j] + products[sources[j]][i]) / 2 for i, j in beside])
    return np.array(rows)


def neighbours(found: Choices) -> tuple[tuple[int, int], ...]:
    """Lists the pairs of groups of one layer, and of a layer and the next, i < j."""
    layer = _layers(found)
    return tuple((i, j) for i in layer for j in layer if i < j and abs(layer[i] - layer[j]) <= 1)


def directions(found: Choices) -> tuple[tuple[int, ...], ...]:
    """Lists the groups that go into one product with the Hessian."""
    layer, made = _layers(found), {}
    for i in layer:
        names = tuple(sorted({m.prefix + m.name for m in found.groups[i].members}))
        made.setdefault((names, layer[i] % APART), []).append(i)
    return tuple(map(tuple, made.values()))


def _layers(found: Choices) -> dict[int, int]:
    """Layer of each group that lies in one."""
    places = {i: {(m.prefix, m.layer) for m in g.members} for i, g in enumerate(found.groups)}
    prefix = found.low.layer.prefix
    only = {i: next(iter(mine)) for i, mine in places.items() if len(mine) == 1}
    return {i: layer for i, (where, layer) in only.items() if where == prefix}


def _product(
    found: Choices, fixed: Arrays, reference: jax.Array, at: Tensors, groups: tuple[int, ...]
) -> Float64[np.ndarray, " g"]:
    """Returns t_j (H v)_j by group, v the factors of some groups, H halfway along the path."""
    others, none = [i not in groups for i in range(len(found.groups))], all_raised(found)
    v = {n: (t - none[n]) * at[n] for n, t in factors(found, others).items()}
    middle = {n: (none[n] + t) / 2 for n, t in at.items()}
    rows = _hessian_product(found.low, fixed, reference, middle, v)
    total = {n: np.atleast_1d(np.asarray(x * at[n], np.float64)) for n, x in rows.items()}
    return np.array([
        sum(total[m.prefix + m.name][m.layer] for m in group.members) for group in found.groups
    ])  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _hessian_product(
    dec: Decoder, read: Arrays, reference: jax.Array, at: Tensors, v: Tensors
) -> Tensors:
    """Returns H v at the factors `at`."""
    slopes = jax.grad(lambda t: divergence(dec, read, reference, t))
    return jax.jvp(slopes, (at,), (v,))[1]


def significant(
    found: Choices, terms: Float64[np.ndarray, "n p"], most: int, errors: float = 2.0
) -> tuple[Pair, ...]:
    """Keeps the largest terms, by size, that are at least `errors` standard errors from 0.

    Args:
      terms: as `pair_terms` gives them, of two windows or more.
      most: terms to keep, at most: each is a variable of the program.

    Raises:
      UserError: one window alone, which has no standard error.
    """
    if len(terms) < 2:
        raise UserError(
            f"pair terms: {len(terms)} window; expected two or more, to know the noise; give a"
            " longer text"
        )
    mean, error = terms.mean(0), terms.std(0, ddof=1) / np.sqrt(len(terms))
    beside = neighbours(found)
    sure = [p for p in np.argsort(-np.abs(mean)) if abs(mean[p]) > errors * error[p]]
    return tuple(Pair(beside[p][0], beside[p][1], float(mean[p])) for p in sure[:most])
