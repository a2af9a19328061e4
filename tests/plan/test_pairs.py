"""Pair terms against the Hessian itself, on tiny models."""

import jax
import numpy as np
import pytest
from test_charges import IDS, low_and_high, made

from qnpu_jax.plan.charges import arrays, charges, divergence, divergences, factors, rounded_pass
from qnpu_jax.plan.pairs import (
    Losses,
    Pair,
    directions,
    neighbours,
    pair_terms,
    significant,
)


def of_the_hessian(model, references, low) -> tuple[np.ndarray, np.ndarray]:
    """Terms of all neighbours, as measured, and read off the whole Hessian."""
    found, at = model.choices, factors(model.choices, low)
    read = arrays(model, IDS[0])
    _, errors = rounded_pass(found.low, read, at)
    fixed = read._replace(errors=read.errors | errors)
    hessian = jax.hessian(lambda t: divergence(found.low, fixed, references[0], t))(
        {n: t / 2 for n, t in at.items()}
    )

    def entry(i: int, j: int) -> float:
        total = 0.0
        for a in found.groups[i].members:
            for b in found.groups[j].members:
                x = np.asarray(hessian[a.prefix + a.name][b.prefix + b.name])
                total += float(x[a.layer, b.layer])
        return total

    exact = np.array([entry(*pair) for pair in neighbours(found)])
    return pair_terms(model, IDS[:1], references[:1], low)[0], exact


def test_terms_are_those_of_the_hessian():
    """Of two layers no direction has two groups, so that nothing is left out."""
    model, references, *_ = made("gqa_llama3")
    assert model.choices.low.layer.layers == 2
    terms, exact = of_the_hessian(model, references, low_and_high(model)[0])
    # Float32, summed in another order.
    np.testing.assert_allclose(terms, exact, atol=1e-5 * np.abs(exact).max(), rtol=1e-2)


@pytest.mark.nightly
def test_layers_further_apart_have_little_to_do_with_each_other():
    """Of four layers, the first and the last are in one direction: .97 of the tiny Gemma's."""
    model, references, *_ = made("gemma3_tiny")
    assert model.choices.low.layer.layers == 4
    terms, exact = of_the_hessian(model, references, low_and_high(model)[0])
    assert np.corrcoef(terms, exact)[0, 1] > 0.95


def test_neighbours_share_a_layer_or_lie_side_by_side():
    model, *_ = made("gqa_llama3")
    groups = model.choices.groups
    for i, j in neighbours(model.choices):
        assert i < j
        layers = [{m.layer for m in groups[k].members} for k in (i, j)]
        assert all(len(x) == 1 for x in layers)
        assert abs(min(layers[0]) - min(layers[1])) <= 1
    every = [i for v in directions(model.choices) for i in v]
    assert len(every) == len({*every})
    assert {*every} == {i for pair in neighbours(model.choices) for i in pair}


def test_terms_of_raised_groups_are_nothing():
    model, references, *_ = made("gqa_llama3")
    up = [g.kind == "weight" for g in model.choices.groups]
    terms = pair_terms(model, IDS[:1], references[:1], up)[0]
    for (i, j), term in zip(neighbours(model.choices), terms, strict=True):
        assert not (up[i] or up[j]) or term == 0


def test_with_pair_terms_the_low_plan_is_predicted_as_charged():
    own, charged = np.array([1.0, 2.0, 3.0]), np.array([1.0, -1.0, 4.0])
    none = [False] * 3
    made = Losses(0.5, own, (Pair(0, 2, 0.4), Pair(1, 2, -0.2))).charged(charged, none)
    assert made.predicted(none) == pytest.approx(0.5 + 1.0 + 0.0 + 4.0)
    assert made.predicted([True] * 3) == 0.5
    # Without the first: its own term and the pair go.
    assert made.predicted([True, False, False]) == pytest.approx(5.5 - 0.8 - 0.4)


def test_pairs_foretell_what_raising_several_groups_wins():
    """Better than charges alone, over random halves of the groups: .989 for .985."""
    model, references, *_ = made("gqa_llama3")
    low, _ = low_and_high(model)
    found = charges(model, IDS, references, low)
    terms = pair_terms(model, IDS, references, low)
    alone = Losses(float(found.base.mean()), found.groups.mean(0)).charged(
        found.groups.mean(0), low
    )
    pairs = significant(model.choices, terms, 10**6, errors=0.0)
    both = Losses(alone.base, alone.own, pairs).charged(found.groups.mean(0), low)
    rng, kls = np.random.default_rng(4), []
    for _ in range(40):
        up = (rng.random(len(low)) < 0.5).tolist()
        kl = divergences(model, IDS, references, up).mean()
        kls.append((kl, alone.predicted(up), both.predicted(up)))
    one, two = np.corrcoef(np.transpose(kls))[0, 1:]
    assert 0.95 < one < two
