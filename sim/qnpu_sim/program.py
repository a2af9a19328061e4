"""The simulator: an `IntegerModel` executed on integers, every tensor by name.

One compiled layer serves all layers: what differs between them (weights, multipliers, tables) is an
argument. Bits are part of the compiled program, so a model of mixed precision compiles one layer
per pattern of bits. A GPU computes all layers in one program (`qnpu_sim.all_layers`), where only logits are
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Graph
from qnpu_jax.integer import IntegerModel
from qnpu_sim import parallel
from qnpu_sim.all_layers import Stack, run_all, stacks
from qnpu_sim.graph_constants import constants_of, tight_sums
from qnpu_sim.rounding import Profile, rules_of
from qnpu_sim.run_graph import Codes, run_graph, same_bits, sequence_input

NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Program:
    """A model made ready for one profile and one length.

    Attributes:
      decoder: the staged graphs (`IntegerModel.decoder`).
      codes: per graph and layer, codes of parameters and shared inputs by local name.
      constants: per graph and layer, the kernels' constants by output name.
      mesh: the devices that share a batch's sequences; None for one.
      at_once: whether all layers run in one program where nothing but the logits is kept.
    """

    decoder: Any
    profile: Profile
    codes: list[list[Codes]]
    constants: list[list[dict[str, Any]]]
    mesh: Mesh | None = None
    at_once: bool = False

    @cached_property
    def stacks(self) -> list[list[Stack]]:
        """Per graph its layers' codes and constants, stacked."""
        graphs = zip(self.decoder.graphs, self.codes, self.constants, strict=True)
        with jax.enable_x64():
            made = [stacks(graph, list(zip(*own, strict=True))) for graph, *own in graphs]
        return made if self.mesh is None else parallel.replicate(self.mesh, made)


def nothing(_: str) -> bool:
    """Keeps no tensor but the logits."""
    return False


def compile_model(
    model: IntegerModel,
    dec: Any,
    profile: Profile = "litert_ref",
    devices: Sequence[Any] | None = None,
    at_once: bool | None = None,
) -> Program:
    """Makes the constants of every op and puts them and the weights on the device.

    Args:
      dec: `model.decoder(tokens, ...)`.
      profile: a name of `qnpu_sim.rounding.PROFILES`, or an `Npu`.
      devices: of JAX; each gets all weights, and its share of the sequences of a batch;
        None for JAX's default device. The bits do not depend on them.
      at_once: all layers in one program where `run` keeps nothing; None: on a GPU. The bits do not
        depend on it.

    Raises:
      UserError: the profile cannot represent an op, or its accumulators may overflow.
    """
    rules = rules_of(profile)
    tight = tight_sums(model, dec, rules)
    shared = model.inputs(dec)
    mesh = None if devices is None else parallel.mesh_of(devices)
    put = partial(jax.tree.map, jnp.asarray) if mesh is None else partial(parallel.replicate, mesh)
    with jax.enable_x64():
        codes, constants = [], []
        for graph in dec.graphs:
            layers = range(graph.layers)
            own = [_codes_of(model, graph, i, shared) for i in layers]
            codes.append([put(c) for c in own])
            made = [constants_of(model, graph, i, own[i], rules, tight) for i in layers]
            constants.append([put(c) for c in made])
    if at_once is None:
        at_once = _platform(mesh) == "gpu"
    return Program(dec, profile, codes, constants, mesh, at_once)


def run(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool] | str = nothing,
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Codes:
    """Codes of the logits, and of every tensor whose global name `keep` accepts.

    Args:
      ids: (T,) or (B, T) token ids. Of a program on several devices each takes B / devices
        sequences, rounded up; one sequence (T,) alone is run by all of them alike.
      keep: chooses computed tensors by global name: a predicate, or a shell-style pattern
        (`layers.3.attn.*`), upper and lower case told apart.
      inputs: of the layers; cached keys and values `layers.3.attn.cache_k` (N, C, K) where the
        program has a cache, and in place of the program's own what all layers share (`mask`,
        `rope.cos`, `rope.sin`). Takes one sequence, ids (T,).

    Returns:
      By global name: `head.logits` (.., T, V) and what was kept, with the batch axis of `ids`.

    Raises:
      UserError: a pattern that matches no computed tensor.
    """
    if not callable(keep):
        keep = _matching(program.decoder, keep)
    if program.at_once and keep is nothing and not inputs:
        return {"head.logits": _logits(program, jnp.asarray(ids, jnp.int32))}
    out: Codes = {}
    for graph, layer, env in steps(program, ids, keep, inputs):
        out.update(
            {
                graph.global_name(layer, n): x
                for n, x in env.items()
                if n in graph.outputs or keep(graph.global_name(layer, n))
            }
        )
    return {n: x for n, x in out.items() if n == "head.logits" or keep(n)}


def _matching(dec: Any, pattern: str) -> Callable[[str], bool]:
    """The predicate of a shell-style pattern over the global names of computed tensors.

    Raises:
      UserError: it matches none.
    """
    if not isinstance(pattern, str):
        expected = "expected a pattern such as 'layers.3.attn.*', or a function of a tensor's name"
        raise UserError(f"keep: {expected}; got {pattern!r}; give one of them")
    names = {
        graph.global_name(layer, tensor.name)
        for graph in dec.graphs
        for layer in range(graph.layers)
        for tensor in graph.named("activation")
    }
    chosen = frozenset(n for n in names if fnmatchcase(n, pattern))
    if not chosen:
        raise UserError(
            f"keep={pattern!r}: expected a pattern of tensor names, such as 'layers.3.attn.*'; got"
            f" one that matches none of {len(names)}; `qnpu graph` prints every name"
        )
    return chosen.__contains__


def _logits(program: Program, ids: jax.Array) -> jax.Array:
    """By all layers in one program, for a part of the batch at a time."""
    mesh, size = program.mesh, len(ids)
    if ids.ndim == 2:
        size = sequences_at_once(*ids.shape) * (1 if mesh is None else mesh.size)
    done = []
    for some in jnp.split(ids, [*range(size, len(ids), size)]):
        fed = some if mesh is None else parallel.spread(mesh, some)
        with jax.enable_x64():
            logits = _compiled_program(mesh)(program.decoder.graphs, program.stacks, fed)
        done.append(logits[: len(some)])
    return done[0] if len(done) == 1 else jnp.concatenate(done)


def steps(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool],
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Iterator[tuple[Graph, int, Codes]]:
    """Graph by graph and layer by layer: its output and the kept tensors, by local name."""
    mesh, ids = program.mesh, jnp.asarray(ids, jnp.int32)
    values: Codes = {"ids": ids if mesh is None else parallel.spread(mesh, ids)}
    run_layer = _compiled_layer(mesh)
    for graph, codes, constants in zip(
        program.decoder.graphs, program.codes, program.constants, strict=True
    ):
        for layer in range(graph.layers):
            kept = tuple(
                t.name
                for t in graph.tensors
                if t.kind == "activation"
                and (t.name in graph.outputs[:1] or keep(graph.global_name(layer, t.name)))
            )
            step = _Step(graph, same_bits(graph, layer), kept)
            own = {t.name: graph.global_name(layer, t.name) for t in graph.named("input")}
            given = {n: inputs.get(g, inputs.get(n)) for n, g in own.items()}
            values |= {n: jnp.asarray(x) for n, x in given.items() if x is not None}
            with jax.enable_x64():  # not while the caller has what is yielded
                env = run_layer(step, codes[layer], constants[layer], values)
            filled = mesh is not None and ids.ndim == 2 and ids.shape[0] % mesh.size
            yield graph, layer, {n: x[: len(ids)] for n, x in env.items()} if filled else env
            values = {"input.residual": env[graph.outputs[0]]}


_CPU_OPTIONS = {
    "xla_disable_hlo_passes": "cse_barrier_expander,tree_reduction_rewriter",
    "xla_cpu_prefer_vector_width": 512,
}
"""Two passes of XLA's CPU compiler cost half of the speed, and bits depend on none of this. One
removes the barriers of `run_graph` before fusion, which then computes a tensor anew for each of its
readers; the other cuts integer reductions into windows that it does not vectorize."""


def sequences_at_once(batch: int, tokens: int) -> int:
    """So many sequences of a batch are computed at a time: on a CPU enough for the dots and few
    enough for caches, on a GPU enough to fill it."""
    fit = (512 if jax.default_backend() == "cpu" else 8192) // tokens
    return max(1, min(batch, fit))


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


@cache
def _compiled_layer(mesh: Mesh | None) -> Callable[..., Codes]:
    options = _CPU_OPTIONS if _platform(mesh) == "cpu" else None
    function = _run_layer if mesh is None else partial(_run_layer_on, mesh)
    return jax.jit(function, static_argnums=0, compiler_options=options)


@cache
def _compiled_program(mesh: Mesh | None) -> Callable[..., jax.Array]:
    options = _CPU_OPTIONS if _platform(mesh) == "cpu" else None
    function = run_all if mesh is None else partial(_run_all_on, mesh)
    return jax.jit(function, static_argnums=0, compiler_options=options)


def _run_all_on(
    mesh: Mesh, graphs: tuple[Graph, ...], of_graphs: list[list[Stack]], ids: jax.Array
) -> jax.Array:
    function = partial(run_all, graphs)
    return parallel.shards(mesh, function, batched=ids.ndim == 2)(of_graphs, ids)


class _Step(NamedTuple):
    """One compiled program: a layer of a graph, and the tensors that it returns, by local name."""

    graph: Graph
    layer: int
    kept: tuple[str, ...]


def _run_layer(step: _Step, codes: Codes, constants: dict[str, Any], values: Codes) -> Codes:
    def one(values: Codes) -> Codes:
        env = run_graph(step.graph, step.layer, {**codes, **values}, constants)
        return {n: env[n] for n in step.kept}

    name, shape = sequence_input(step.graph)
    if values[name].ndim == len(shape):
        return one(values)
    at_once = sequences_at_once(len(values[name]), shape[0])
    return jax.lax.map(one, values, batch_size=at_once)


def _run_layer_on(
    mesh: Mesh, step: _Step, codes: Codes, constants: dict[str, Any], values: Codes
) -> Codes:
    name, shape = sequence_input(step.graph)
    batched = values[name].ndim > len(shape)
    function = partial(_run_layer, step)
    return parallel.shards(mesh, function, batched=batched)(codes, constants, values)


def _codes_of(
    model: IntegerModel, graph: Graph, layer: int, shared: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    own = model.constants(graph, layer)
    return own | {t.name: shared[t.name] for t in graph.named("input") if t.name in shared}
