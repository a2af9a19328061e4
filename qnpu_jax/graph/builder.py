"""A `Builder` stages a forward function, written in plain Python, into a `Graph`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from qnpu_jax.config import QuantSpec
from qnpu_jax.errors import UserError
from qnpu_jax.graph.graph import Graph, Node, TensorSpec, TokenIds, global_name
from qnpu_jax.graph.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Embedding,
    FullyConnected,
    Gelu,
    Logistic,
    Mul,
    Op,
    Requantize,
    Rsqrt,
    Softmax,
    Sqrt,
    eval_op,
    tied_inputs,
)

_UNIFORM = (
    *(FullyConnected, BatchMatmul, Add, AddMask, Mul, Softmax),
    *(Logistic, Gelu, Sqrt, Rsqrt),
)
"""Ops whose kernels take activations of one type and give that type (LiteRT tflite/kernels)."""


def _is_weight(x: TensorSpec) -> bool:
    """Whether a linear's kernel takes the parameter at a width of its own."""
    return x.name.rpartition(".")[2] in ("weight", "bias")


@dataclass
class Builder:
    """Stages a graph: each method appends a tensor or a node, and returns the tensor's spec.

    Attributes:
      prefix: precedes local names in global ones.
      bits: function from a local name to the tensor's bits, one per layer.
    """

    prefix: str
    bits: Callable[[str], tuple[int, ...]]
    _tensors: dict[str, TensorSpec] = field(default_factory=dict)
    _nodes: list[Node] = field(default_factory=list)
    _scopes: list[str] = field(default_factory=list)
    _ids: TokenIds | None = None

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prepends `name.` to every name staged inside."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def _named(self, name: str) -> str:
        return ".".join([*self._scopes, name])

    def _register(self, spec: TensorSpec) -> TensorSpec:
        assert spec.name not in self._tensors, spec.name
        self._tensors[spec.name] = spec
        return spec

    def input(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        bits: tuple[int, ...] | None = None,
        fixed: tuple[float, ...] | None = None,
    ) -> TensorSpec:
        """Stages a symmetric graph input, at the plan's bits or those given."""
        name = self._named(name)
        quant = QuantSpec(self.bits(name) if bits is None else bits, symmetric=True)
        return self._register(TensorSpec(name, shape, "input", quant, fixed))

    def ids(self, name: str, shape: tuple[int, ...]) -> TokenIds:
        """Stages the input of token ids, the one tensor that is not quantized."""
        self._ids = TokenIds(self._named(name), shape)
        return self._ids

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        axis: int | None = None,
        bits: tuple[int, ...] | None = None,
    ) -> TensorSpec:
        """Stages a parameter (weight, bias, prefix K/V): symmetric, per channel along `axis`."""
        name = self._named(name)
        quant = QuantSpec(self.bits(name) if bits is None else bits, True, axis)
        return self._register(TensorSpec(name, shape, "param", quant))

    def constant(self, name: str, shape: tuple[int, ...], like: TensorSpec) -> TensorSpec:
        """Stages a parameter that is an operand of ADD or MUL beside `like`, at its bits."""
        return self.param(name, shape, bits=like.quant.bits)

    def gather(self, name: str, ids: TokenIds, table: TensorSpec) -> TensorSpec:
        """Appends `name = table[ids]`; the output has the table's scale."""
        quant = QuantSpec(table.quant.bits, table.quant.symmetric)
        return self._append(self._named(name), Embedding(), (ids, table), quant)

    def add(self, name: str, op: Op, *inputs: TensorSpec, symmetric: bool = False) -> TensorSpec:
        """Appends `name = op(inputs)`; operands narrower than the output are widened, exactly.

        Raises:
          UserError: the plan makes the output narrower than an operand, which only a requantize may
            do.
        """
        name = self._named(name)
        tied = tied_inputs(op, tuple(t.name for t in inputs))
        if tied:
            source = self._tensors[tied[0]].quant
            quant = QuantSpec(source.bits, source.symmetric)
        else:
            quant = QuantSpec(self.bits(name), symmetric)
        if isinstance(op, Add | Mul):
            self._check_constants(inputs, quant.bits)
        if isinstance(op, _UNIFORM):
            inputs = tuple(self._widen(t, quant.bits, name) for t in inputs)
        if isinstance(op, FullyConnected):
            self._check_bias(inputs[0], inputs[2])
        return self._append(name, op, inputs, quant)

    def _append(
        self, name: str, op: Op, inputs: Sequence[TensorSpec | TokenIds], quant: QuantSpec
    ) -> TensorSpec:
        shapes = (
            jax.ShapeDtypeStruct(t.shape, jnp.int32 if isinstance(t, TokenIds) else jnp.float32)
            for t in inputs
        )
        shape = jax.eval_shape(partial(eval_op, op), *shapes).shape
        self._nodes.append(Node(op, tuple(t.name for t in inputs), name))
        return self._register(TensorSpec(name, shape, "activation", quant))

    def fully_connected(
        self, name: str, x: TensorSpec, features: int, *, symmetric: bool = False
    ) -> TensorSpec:
        """Stages a linear with its parameters `<name>.weight` (features, K) and `<name>.bias`."""
        weight = self.param(f"{name}.weight", (features, x.shape[-1]), axis=0)
        bias = self.param(f"{name}.bias", (features,), axis=0)
        return self.add(name, FullyConnected(), x, weight, bias, symmetric=symmetric)

    def _check_bias(self, x: TensorSpec, bias: TensorSpec) -> None:
        """Raises UserError for a 64-bit bias of an 8-bit input: LiteRT would read it as 32 bits."""
        for i, (bits, wide) in enumerate(zip(x.quant.bits, bias.quant.bits, strict=True)):
            if bits <= 8 and wide > 32:
                raise UserError(
                    f"{global_name(self.prefix, i, bias.name)}: the plan gives it {wide} bits;"
                    f" expected 32 beside an input of {bits}; correct the rule that matches it"
                )

    def _check_constants(self, operands: Sequence[TensorSpec], bits: tuple[int, ...]) -> None:
        """Raises UserError for a constant operand that has not the output's bits: kernels of ADD
        and MUL take one type, and a constant is not widened."""
        for x in (t for t in operands if t.kind == "param"):
            for i, (have, want) in enumerate(zip(x.quant.bits, bits, strict=True)):
                if have != want:
                    raise UserError(
                        f"{global_name(self.prefix, i, x.name)}: the plan gives it {have} bits;"
                        f" expected {want}, as its sum or product has; correct the rule that"
                        " matches it"
                    )

    def _widen(self, x: TensorSpec, bits: tuple[int, ...], consumer: str) -> TensorSpec:
        if x.quant.bits == bits or (x.kind == "param" and _is_weight(x)):
            return x
        # No op may widen a parameter, and a kernel would read one of another width wrongly.
        assert x.kind != "param", f"{consumer}: {x.name} has {x.quant.bits} bits, not {bits}"
        for i, (have, want) in enumerate(zip(x.quant.bits, bits, strict=True)):
            if have > want:
                raise UserError(
                    f"{global_name(self.prefix, i, consumer)}: the plan gives it fewer bits than"
                    f" its input {global_name(self.prefix, i, x.name)} ({have}); expected at least"
                    " as many; raise the one or lower the other"
                )
        name = f"{x.name}.i{max(bits)}"
        if name in self._tensors and self._tensors[name].quant.bits != bits:
            # Another op reads it wide in other layers.
            name = f"{x.name}.{consumer.rpartition('.')[2]}.i{max(bits)}"
        if name not in self._tensors:
            self._nodes.append(Node(Requantize(), (x.name,), name))
            self._register(
                TensorSpec(name, x.shape, "activation", QuantSpec(bits, x.quant.symmetric))
            )
        return self._tensors[name]

    def finish(self, *outputs: TensorSpec) -> Graph:
        return Graph(
            self.prefix,
            tuple(self._tensors.values()),
            tuple(self._nodes),
            tuple(t.name for t in outputs),
            self._ids,
        )
