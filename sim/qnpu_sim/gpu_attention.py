"""Fused attention for a GPU: scores, mask, softmax, requantization and mix of a group of heads in
one Pallas kernel.

XLA makes four kernels of these five ops, and every score goes through memory between them. Here the
scores of a few queries stay in registers. Each op is the function that defines it
(`qnpu_sim.elementwise`, `qnpu_sim.kernels`), so the codes are those of the ops one by one.

Sizes: M queries, N keys, K elements of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qnpu_jax.graph import AddMask, BatchMatmul, Graph, Node, Requantize, Softmax, is_identity
from qnpu_sim import elementwise, kernels
from qnpu_sim.elementwise import AddConstants, QuantizeConstants
from qnpu_sim.exact_dots import dot
from qnpu_sim.graph_constants import narrow_source
from qnpu_sim.kernels import BatchMatmulConstants, SoftmaxInt16Constants

ROWS = 16
"""Queries of a block: the fewest rows that tensor cores multiply."""
KEYS, REST = 128, 32
"""Keys of a full block, and of the blocks at the end."""
FEWEST_TERMS = 32
"""Smallest K: the number of int8 products that tensor cores sum at once. With K = 16 Triton (in jax
0.11.2) gives wrong sums without an error."""
MOST_KEYS = 5 * KEYS
"""Largest N. Registers hold the scores of a block: `ROWS` x `MOST_KEYS` are 80 for each thread.
512 keys and a prefix were measured; more scores would spill into memory."""
WARPS = 4
"""Warps, of 32 threads each, that compute a block of queries."""


class Constants(NamedTuple):
    """Constants of the five ops, in their order."""

    scores: BatchMatmulConstants
    mask: AddConstants
    softmax: SoftmaxInt16Constants
    probs: QuantizeConstants
    mixed: BatchMatmulConstants


class Chain(NamedTuple):
    """Five ops that `attention` can compute, by local tensor names.

    Attributes:
      outputs: of the ops, in order.
      copies: outputs of ops between them that do nothing in this layer.
      queries, keys: the 8-bit tensors that the operands of the scores were widened from.
    """

    outputs: tuple[str, ...]
    copies: tuple[str, ...]
    queries: str
    keys: str
    values: str
    mask: str

    @property
    def inside(self) -> set[str]:
        """Names of the tensors that the kernel keeps to itself."""
        return {*self.outputs[:-1], *self.copies}

    @property
    def operands(self) -> tuple[str, str, str, str]:
        """Names of the arrays that `attention` takes, in its order."""
        return self.queries, self.keys, self.values, self.mask

    def constants(self, of_ops: Mapping[str, Any]) -> Constants:
        """Picks the constants of these ops from those of a graph, by output name."""
        return Constants(*(of_ops[name] for name in self.outputs))


def chains(graph: Graph, layer: int, constants: Mapping[str, Any]) -> dict[str, Chain]:
    """Finds the parts of a graph that `attention` can compute.

    The graph has to have int16 scores of 8-bit queries and keys, 8-bit probabilities and values,
    keys and values with zero point 0, and sums that are proved to fit. A code may depend on its
    operands only; in vector code (`elementwise.in_lanes`) it depends on its place, too. A GPU needs
    shapes in whole blocks, and keys that its registers hold.

    Returns:
      By the name of the last output.
    """
    found = (_chain(graph, layer, n) for n in graph.nodes if isinstance(n.op, Softmax))
    return {c.outputs[-1]: c for c in found if c is not None and _fits(graph, layer, c, constants)}


def _chain(graph: Graph, layer: int, softmax: Node) -> Chain | None:
    """Returns the ops around a SOFTMAX if they are the five and no other op reads their results. An
    op that does nothing in this layer is none of them."""
    made = {n.output: n for n in graph.nodes}
    mask = made.get(softmax.inputs[0])
    scores = made.get(mask.inputs[0]) if mask is not None else None
    nodes, copies = [scores, mask, softmax], []
    for _ in range(2):
        node = _reader(graph, nodes[-1])
        while node is not None and is_identity(graph, node, layer):
            copies.append(node.output)
            node = _reader(graph, node)
        nodes.append(node)
    ops = (BatchMatmul, AddMask, Softmax, Requantize, BatchMatmul)
    if not all(n is not None and isinstance(n.op, op) for n, op in zip(nodes, ops, strict=True)):
        return None
    queries, keys = (narrow_source(graph, n, layer) for n in nodes[0].inputs)
    outputs = tuple(n.output for n in nodes)
    values, mask = nodes[-1].inputs[1], nodes[1].inputs[1]
    return Chain(outputs, tuple(copies), queries, keys, values, mask)


def _reader(graph: Graph, node: Node | None) -> Node | None:
    """The op that reads an op's result; None where none does, or several."""
    readers = [n for n in graph.nodes if node is not None and node.output in n.inputs]
    return readers[0] if len(readers) == 1 else None


def _fits(graph: Graph, layer: int, chain: Chain, constants: Mapping[str, Any]) -> bool:
    """Checks bits, zero points, constants and shapes: the conditions of `chains`."""
    own = [constants.get(name) for name in chain.outputs]
    kinds = get_type_hints(Constants).values()
    if not all(isinstance(c, kind) for c, kind in zip(own, kinds, strict=True)):
        return False

    def bits(*names: str) -> set[int]:
        quants = [graph[n].quant for n in names]
        return {q.bits[layer] for q in quants if q is not None}

    def symmetric(name: str) -> bool:
        quant = graph[name].quant
        return quant.symmetric

    _, rows, size = graph[chain.queries].shape
    keys = graph[chain.keys].shape[1]
    return (
        bits(chain.queries, chain.keys, chain.values, *chain.outputs[3:]) == {8}
        and bits(*chain.outputs[:3]) == {16}
        and symmetric(chain.keys)
        and symmetric(chain.values)
        and all(c.limit is None for c in own if isinstance(c, BatchMatmulConstants))
        and rows % ROWS == 0
        and keys <= MOST_KEYS
        and FEWEST_TERMS <= size < 2**31 // 255**2
        and size & (size - 1) == 0
    )


class _Block(NamedTuple):
    """Keys that are multiplied at a time: `size` from `start`, of which the first `real` exist."""

    start: int
    size: int
    real: int


def _blocks(keys: int) -> list[_Block]:
    """Cuts keys into blocks of `KEYS`, and the remainder into blocks of `REST`."""
    blocks, start = [], 0
    while start < keys:
        size = KEYS if keys - start >= KEYS else REST
        blocks.append(_Block(start, size, min(size, keys - start)))
        start += size
    return blocks


def attention(
    queries: Array, keys: Array, values: Array, mask: Array, c: Constants, interpret: bool = False
) -> Array:
    """Computes attention: quantize(softmax(queries keys^T + mask)) values^T, in integer codes.

    Args:
      queries: (M, K) int8 codes; M a multiple of `ROWS`, K a power of two >= `FEWEST_TERMS`.
      keys: (N, K) int8 codes, zero point 0; N up to `MOST_KEYS`.
      values: (K, N) int8 codes, zero point 0.
      mask: (M, N) int16 codes.
      c: constants of the five ops.
      interpret: compute as ordinary JAX, without a GPU.

    Returns:
      (M, K) int8 codes, those of the five ops one by one.
    """
    blocks = _blocks(keys.shape[0])
    more = blocks[-1].start + blocks[-1].size - keys.shape[0]
    keys, values = jnp.pad(keys, ((0, more), (0, 0))), jnp.pad(values, ((0, 0), (0, more)))
    # The mask's term of the ADD is the same for all heads and sequences: computed once, outside.
    masks = elementwise.add_term(mask, c.mask.y_zero_point, c.mask.y_scale)
    masks = jnp.pad(masks, ((0, 0), (0, more)))
    offsets = (_offset(c.scores, keys), _offset(c.mixed, values))
    leaves, tree = jax.tree.flatten((*offsets, c))
    shapes = [jnp.shape(leaf) for leaf in leaves]
    leaves = [jnp.reshape(leaf, shape or (1,)) for leaf, shape in zip(leaves, shapes, strict=True)]

    def kernel(*refs: Any) -> None:
        *operands, out = refs
        own = zip(operands[4:], shapes, strict=True)
        offset, of_mixed, constants = tree.unflatten([r if s else r[0] for r, s in own])
        out[...] = _attend(operands[:4], offset, of_mixed[...], constants, blocks)

    arrays = (queries, keys, values, masks, *leaves)
    by_rows = (True, False, False, True, *(False for _ in leaves))
    return pl.pallas_call(
        kernel,
        grid=(queries.shape[0] // ROWS,),
        in_specs=[_spec(a, rows) for a, rows in zip(arrays, by_rows, strict=True)],
        out_specs=_spec(queries, True),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.int8),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(*arrays)


def _spec(array: Array, by_rows: bool) -> pl.BlockSpec:
    """Block of an array that one call of the kernel reads: the next `ROWS` rows, or all of it."""
    zeros = (np.int32(0),) * (array.ndim - 1)
    if by_rows:
        return pl.BlockSpec((ROWS, *array.shape[1:]), lambda i: (i, *zeros))
    return pl.BlockSpec(array.shape, lambda i: (np.int32(0), *zeros))


def _attend(
    operands: Sequence[Any], offset: Any, of_mixed: Array, c: Any, blocks: list[_Block]
) -> Array:
    """Computes the codes of one block of queries.

    Args:
      operands: Pallas references to queries, keys, values and the mask's term, read in parts.
      offset: reference to `_offset` of the scores, (N,).
      of_mixed: `_offset` of the mix, (K,) int32.
      c: `Constants`, with references in place of tables.
    """
    queries, keys, values, masks = operands
    rows, masked, exps = queries[...], [], []
    for b in blocks:
        part = pl.ds(b.start, b.size)
        acc = _product(rows, keys[part, :]) + offset[part][None, :]
        scores = kernels.codes_of_sums(acc, c.scores, jnp.int16)
        a = elementwise.add_term(scores, c.mask.x_zero_point, c.mask.x_scale)
        z = elementwise.add_terms(a, masks[:, part], c.mask, dtype=jnp.int16).astype(jnp.int32)
        masked.append(_only_real(z, b, -(2**15)))
    top = reduce(jnp.maximum, (jnp.max(z, 1) for z in masked))[:, None]
    for z, b in zip(masked, blocks, strict=True):
        exps.append(_only_real(c.softmax.exp[top - z].astype(jnp.int32), b, 0))
    total = reduce(jnp.add, (jnp.sum(e, 1, dtype=jnp.int32) for e in exps))[:, None]
    acc = of_mixed[None, :]
    for e, b in zip(exps, blocks, strict=True):
        y = kernels.softmax_quotient(e, total, c.softmax.reciprocal)
        probs = elementwise.quantize(y, c.probs, dtype=jnp.int8)
        acc = acc + _product(probs, values[:, pl.ds(b.start, b.size)])
    return kernels.codes_of_sums(acc, c.mixed, jnp.int8)


def _offset(c: BatchMatmulConstants, y: Array) -> Array:
    """Zero point's part of sum_k (x_k - zx) y_nk: -zx sum_k y_nk, (N,) int32."""
    return -jnp.asarray(c.x_zero_point) * jnp.sum(y, 1, dtype=jnp.int32)


def _product(x: Array, y: Array) -> Array:
    """Multiplies int8 arrays: x y^T, as int32."""
    return dot(x, y, (((1,), (1,)), ((), ())))


def _only_real(x: Array, block: _Block, other: int) -> Array:
    """Replaces the values of keys that do not exist by `other`."""
    if block.real == block.size:
        return x
    exists = jax.lax.iota(jnp.int32, block.size) < np.int32(block.real)
    return jnp.where(exists[None, :], x, np.int32(other))
