"""Front door of the simulator: `compile_model` prepares an `IntegerModel`, `run` executes it.

Layers share one compiled program: weights, multipliers and tables are its arguments. Bits are part
of the program, so a model of mixed precision compiles one per pattern of bits, all side by side
(`qnpu_sim.ahead`). Where only logits are asked for, a GPU computes consecutive layers of the same
bits in one program (`qnpu_sim.all_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qnpu_jax.errors import UserError, nearest
from qnpu_jax.graph import Graph, select_shared
from qnpu_jax.integer import IntegerModel
from qnpu_sim import parallel
from qnpu_sim.ahead import compile_ahead
from qnpu_sim.all_layers import Stack, run_stack, stacks
from qnpu_sim.graph_constants import constants_of, dtype_of, tight_sums
from qnpu_sim.rounding import Profile, rules_of
from qnpu_sim.run_graph import Codes, run_graph, same_bits, sequence_input

NO_INPUTS: Mapping[str, Any] = MappingProxyType({})
"""The default of `run`'s inputs."""


@dataclass(frozen=True, eq=False)
class Program:
    """A model prepared for one rounding profile and one sequence length.

    Attributes:
      decoder: the staged graphs (`IntegerModel.decoder`).
      profile: whose arithmetic it has.
      codes: per graph and layer, codes of parameters and shared inputs by local name.
      constants: per graph and layer, the kernels' constants by the op's output name.
      mesh: the devices that share a batch's sequences; None for JAX's default device.
      at_once: consecutive layers of the same bits run in one program where only logits are kept.
      compiled: for what its programs are compiled: what is kept, and shapes of inputs.
    """

    decoder: Any
    profile: Profile
    codes: list[list[Codes]]
    constants: list[list[dict[str, Any]]]
    mesh: Mesh | None = None
    at_once: bool = False
    compiled: set[Any] = field(default_factory=set)

    @cached_property
    def stacks(self) -> list[list[Stack]]:
        """Codes and constants of each graph's layers, stacked (`all_layers`) when first read."""
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
    """Prepares a model: makes the constants of every op, and puts them and the weights on the
    device.

    The bits that `run` gives depend on the profile only, not on `devices` or `at_once`.

    Args:
      dec: the graphs for the length to run, `model.decoder(tokens, ...)`.
      profile: a name of `qnpu_sim.rounding.PROFILES`, or an `Npu`.
      devices: JAX devices; each gets all weights and a share of a batch's sequences. None: JAX's
        default device.
      at_once: run consecutive layers of the same bits in one program where only the logits are
        kept. None: on a GPU.

    Raises:
      UserError: no profile has this name, the profile cannot represent an op, or its accumulators
        may overflow.
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
            own = [model.constants(graph, i) | select_shared(dec, graph, shared, i) for i in layers]
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
    """Runs a program on token ids; returns the codes of the logits and of the tensors to keep.

    Args:
      ids: (T,) or (B, T) token ids in [0, vocabulary). Several devices take B / devices sequences
        each, rounded up; one sequence (T,) is run by all of them alike.
      keep: the computed tensors to return besides the logits, by global name (`layers.3.attn.q`): a
        predicate, or a shell-style pattern such as `layers.3.attn.*`, case-sensitive.
      inputs: integer codes of the layers' inputs, for one sequence, ids (T,). By global name the
        cached keys and values of a program with a cache, `layers.3.attn.cache_k` (N, C, K). By
        name, in place of the program's own, the inputs that layers share: `mask`,
        `rope.cos`, `rope.sin`; in models with several kinds of layers, the names of
        `IntegerModel.inputs`.

    Returns:
      int8 or int16 codes by global name: `head.logits` (.., T, V) and the tensors kept, with the
      batch axis of `ids`.

    Raises:
      UserError: the pattern matches no computed tensor; ids outside the vocabulary, or no integers.
    """
    if not callable(keep):
        keep = _matching(program.decoder, keep)
    _check_ids(ids, program.decoder.config.vocab_size)
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


def _check_ids(ids: Any, size: int) -> None:
    """Refuses what indexing inside a program would silently turn into other ids.

    Raises:
      UserError: as `run`.
    """
    given = np.asarray(ids)
    if given.dtype.kind not in "iu":
        raise UserError(f"ids: of type {given.dtype}; expected integers; pass token ids")
    outside = given[(given < 0) | (given >= size)]
    if outside.size:
        raise UserError(
            f"ids: token {outside.flat[0]} is outside the vocabulary; expected 0 to {size - 1};"
            " take model and tokenizer of the same checkpoint"
        )


def _matching(dec: Any, pattern: str) -> Callable[[str], bool]:
    """Makes the predicate of a shell-style pattern over the global names of computed tensors.

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
            + nearest(pattern, sorted(names))
        )
    return nothing if chosen == {"head.logits"} else chosen.__contains__


def _logits(program: Program, ids: jax.Array) -> jax.Array:
    """Computes logits stack by stack, for part of the batch at a time."""
    mesh, size = program.mesh, len(ids)
    if ids.ndim == 2:
        size = sequences_at_once(*ids.shape) * (1 if mesh is None else mesh.size)
    function, done = _compiled_stack(mesh), []
    for some in jnp.split(ids, [*range(size, len(ids), size)]):
        x = some if mesh is None else parallel.spread(mesh, some)
        graphs = zip(program.decoder.graphs, program.stacks, strict=True)
        calls = [(graph, stack) for graph, own in graphs for stack in own]
        with jax.enable_x64():
            if mesh is None and x.shape not in program.compiled:
                shape = x.shape[:-1]
                new = {s.key(g): (g, s, _input(g, s.layer, shape)) for g, s in calls}
                compile_ahead(function, list(new.values()))
                program.compiled.add(x.shape)
            for graph, stack in calls:
                x = function(graph, stack, x)
        done.append(x[: len(some)])
    return done[0] if len(done) == 1 else jnp.concatenate(done)


def _input(graph: Graph, layer: int, batch: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Shape and type of a layer's sequence input."""
    name, shape = sequence_input(graph)
    dtype = jnp.int32 if graph.ids is not None else dtype_of(graph[name], layer)
    return jax.ShapeDtypeStruct((*batch, *shape), dtype)


def steps(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool],
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Iterator[tuple[Graph, int, Codes]]:
    """Runs a program layer by layer; yields the codes of one layer at a time.

    Args:
      ids, inputs: as for `run`.
      keep: predicate over global names.

    Yields:
      The graph, the layer, and by local name its output and the tensors to keep.
    """
    mesh, ids = program.mesh, jnp.asarray(ids, jnp.int32)
    x = ids if mesh is None else parallel.spread(mesh, ids)
    run_layer, calls = _compiled_layer(mesh), list(_calls(program, keep, inputs))
    if mesh is None:
        _compile_ahead(program, run_layer, calls, ids.shape[:-1])
    for layer, (step, codes, constants, given) in calls:
        graph = step.graph
        values = {sequence_input(graph)[0]: x, **given}
        with jax.enable_x64():  # closed before the yield: the caller's code runs there
            env = run_layer(step, codes, constants, values)
        x = env[graph.outputs[0]]
        filled = mesh is not None and ids.ndim == 2 and ids.shape[0] % mesh.size
        yield graph, layer, {n: y[: len(ids)] for n, y in env.items()} if filled else env


def _calls(
    program: Program, keep: Callable[[str], bool], inputs: Mapping[str, Any]
) -> Iterator[tuple[int, tuple[_Step, Codes, dict[str, Any], Codes]]]:
    """Yields each layer with the arguments of its program, but for the sequence input."""
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
            own = {t.name: graph.global_name(layer, t.name) for t in graph.named("input")}
            given = select_shared(program.decoder, graph, inputs, layer)
            given |= {n: inputs[g] for n, g in own.items() if g in inputs}
            given = {n: jnp.asarray(y) for n, y in given.items()}
            step = _Step(graph, same_bits(graph, layer), kept)
            yield layer, (step, codes[layer], constants[layer], given)


def _compile_ahead(
    program: Program,
    run_layer: Callable[..., Codes],
    calls: Sequence[tuple[int, tuple[_Step, Codes, dict[str, Any], Codes]]],
    batch: tuple[int, ...],
) -> None:
    """Compiles every program that the layers need and that is not compiled yet."""
    new = {}
    for layer, (step, codes, constants, given) in calls:
        key = step, batch, tuple(sorted(given))
        if key not in program.compiled:
            values = {sequence_input(step.graph)[0]: _input(step.graph, layer, batch), **given}
            new[key] = step, codes, constants, values
    compile_ahead(run_layer, list(new.values()))
    program.compiled.update(new)


_CPU_OPTIONS = {
    "xla_disable_hlo_passes": "cse_barrier_expander,tree_reduction_rewriter",
    "xla_cpu_prefer_vector_width": 512,
}
"""Options of XLA's CPU compiler that double the speed and change no bit. The first disabled pass
removes the barriers of `run_graph` before fusion, which then computes a tensor once for each of its
readers. The second cuts integer reductions into windows that XLA does not vectorize."""


def sequences_at_once(batch: int, tokens: int) -> int:
    """Chooses how many sequences of a batch are computed at a time: 512 tokens on a CPU, which are
    enough for efficient dots and fit its caches, and 8,192 on a GPU, which fill it."""
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
def _compiled_stack(mesh: Mesh | None) -> Callable[..., jax.Array]:
    options = _CPU_OPTIONS if _platform(mesh) == "cpu" else None
    function = run_stack if mesh is None else partial(_run_stack_on, mesh)
    return jax.jit(function, static_argnums=0, compiler_options=options)


def _run_stack_on(mesh: Mesh, graph: Graph, stack: Stack, x: jax.Array) -> jax.Array:
    batched = x.ndim > len(sequence_input(graph)[1])
    return parallel.shards(mesh, partial(run_stack, graph), batched=batched)(stack, x)


class _Step(NamedTuple):
    """Static part of a compiled layer.

    Attributes:
      layer: the first one of these bits (`run_graph.same_bits`).
      kept: local names of the tensors to return.
    """

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
