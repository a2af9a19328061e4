"""A model made ready to be planned, and what learning from a plan makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax import pipeline
from qnpu_jax.graph import Graph, Params, Scales, decoder
from qnpu_jax.learn import Calibrated, Learned, learn
from qnpu_jax.measure import float_logits
from qnpu_jax.models import Checkpoint
from qnpu_jax.plan.bench import Bench
from qnpu_jax.plan.charges import mixed
from qnpu_jax.plan.costs import cost
from qnpu_jax.plan.groups import Choices, Member, choices
from qnpu_jax.plan.request import PlanRequest
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import EFFORTS, Effort, Recipe
from qnpu_jax.text import Windows, excerpts, starts_of

FIXED = ("rotation", "diagonal")
"""Groups that do not learn between two plans: high bits are rounded from parameters as they are."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready to be planned.

    Attributes:
      bench: by which all plans of it are judged.
      recipe: of the fewest bits.
      begun: the float model after its prefix.
      text: windows to calibrate with, to learn on, and to judge by.
      calibrated: float parameters, with the ranges of the low plan.
      rounded: parameters and scales of the low plan, with nothing learned.
    """

    bench: Bench
    recipe: Recipe
    begun: pipeline.Prefixed
    text: Windows
    calibrated: Calibrated
    rounded: Learned


def prepared(asked: PlanRequest, checkpoint: Checkpoint, watch: Observer) -> Prepared:
    """Calibrates and rounds the low plan, and gets the float model's logits."""
    learning, recipe = asked.effort.steps > 0, asked.lowest
    effort = asked.effort if learning else EFFORTS["fast"]
    # They also decide which step of learning is kept, by as many as the effort asks for at least.
    count = max(asked.windows, effort.held_out) if learning else asked.windows
    effort = replace(effort, held_out=count)
    with watch.stage("fold, rotate"):
        params = pipeline.prepare(checkpoint.config, checkpoint.params, recipe)
    judges = excerpts.judged(checkpoint, effort)
    with watch.stage("calibration text"):
        if asked.calibration is None:
            steps = lambda steps, n: watch.track(steps, n, "calibration text")  # noqa: E731
            read = excerpts.written(checkpoint, params, recipe, effort, steps)
        else:
            read = excerpts.given(asked.calibration, checkpoint, recipe, effort)
    text = excerpts.windows_of(*read, judges)
    begun = pipeline.with_prefix(
        checkpoint.config, params, recipe, text, starts_of(checkpoint.tokenizer), watch
    )
    calibrated = pipeline.calibrated(begun, recipe, text, watch)
    with watch.stage("round"):
        rounded = learn(calibrated, recipe, EFFORTS["none"], text)
    windows = text.held_out
    ends = (asked.lowest.bits, asked.high.bits)
    staged = [decoder(begun.config, bits, windows.shape[1], len(begun.tokens)) for bits in ends]
    found = choices(*staged)
    model = mixed(found, calibrated.params, rounded.params, rounded.free, recipe.weight_init)
    floats = {n: jnp.asarray(x) for n, x in calibrated.params.items()}
    logits = float_logits(begun.config, recipe.bits, floats)
    references = [jnp.asarray(logits(ids)) for ids in windows]
    bench = Bench(model, cost(found, asked.soc, asked.context), windows, references, watch)
    return Prepared(bench, recipe, begun, text, calibrated, rounded)


def planned(like: Recipe, found: Choices, raised: Sequence[bool], name: str) -> Recipe:
    """The recipe of a plan: another one in all but its name and bits."""
    return replace(like, name=name, bits=found.plan(raised))


def relearned(ready: Prepared, raised: Sequence[bool], effort: Effort, watch: Observer) -> Bench:
    """Learns from a plan, and puts what was learned into the bench.

    Rotations and diagonal scales stay as they are. What is raised keeps the low bits' weights and
    ranges that it had: nothing was learned of these.

    Args:
      raised: the plan, by group.
    """
    found = ready.bench.model.choices
    recipe = planned(ready.recipe, found, raised, f"{ready.recipe.name}-plan")
    effort = replace(effort, without=tuple(dict.fromkeys((*effort.without, *FIXED))))
    calibrated = pipeline.calibrated(ready.begun, recipe, ready.text, watch)
    made = learn(calibrated, recipe, effort, ready.text, watch=watch)
    params = _kept(found, raised, ready.rounded.params, made.params)
    free = _kept(found, raised, ready.rounded.free, made.free)
    model = mixed(found, ready.calibrated.params, params, free, recipe.weight_init)
    return replace(ready.bench, model=model)


def _kept(
    found: Choices, raised: Sequence[bool], before: Params | Scales, after: Params | Scales
) -> dict[str, Any]:
    """Values by stacked global name: `after`, but `before` of raised tensors and their biases."""
    out = {}
    for name, old in before.items():
        graph = next(g for g in found.low.graphs if name.startswith(g.prefix))
        up = _raised(found, raised, graph, name.removeprefix(graph.prefix))
        new = after.get(name, old)
        if not graph.layered:
            out[name] = old if up[0] else new
            continue
        out[name] = jax.tree.map(lambda a, b, up=up: _by_layer(up, a, b), old, new)
    return out


def _raised(found: Choices, raised: Sequence[bool], graph: Graph, name: str) -> list[bool]:
    """Whether a tensor is raised in each layer; a bias is where its linear's weight is."""
    names = (name, name.removesuffix("bias") + "weight")
    of = [[found.index.get(Member(graph.prefix, n, i)) for n in names] for i in range(graph.layers)]
    return [any(i is not None and raised[i] for i in mine) for mine in of]


def _by_layer(up: Sequence[bool], old: Any, new: Any) -> np.ndarray:
    old, new = np.asarray(old), np.asarray(new)
    return np.where(np.reshape(up, (-1, *(1,) * (old.ndim - 1))), old, new)
