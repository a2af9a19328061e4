"""Trials of prefixes: what each does to a model's outliers and to its output.

The output is judged in three readings, each against the original float model on text of several
domains: the model after the prefix in float, and with its activations quantized, their ranges once
as wide as the values, once clipped where that leaves the least squared error. Every tensor takes
the range of the window at hand, so that no calibration is needed to compare prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import Edge, EdgeOfBits, passes, shared_inputs, windows_at_once
from qnpu_jax.graph import Decoder, Graph, Params, Tensors, TensorSpec, decoder, is_widened
from qnpu_jax.transform.prefix import add_prefix, prefix_rows

OUTLIER_RATIO = 500.0
"""A token is an outlier where its largest activation exceeds this multiple of the median token's.

Massive activations lie far above: 1,800 to 2,300 in SmolLM2-135M, where 60 to 90 are left after a
prefix that takes them all; Qwen2.5-Coder-0.5B has 74, and learns best as it is."""
WATCHED = ("mlp.act", "mlp.residual")
"""Tensors where massive activations arise (input of down) and where they stay (residual stream)."""
RUINED = 1e6
"""KL of a model whose logits are not finite: coarse ranges may round a sum of squares to 0."""
SHRINKS = np.asarray([1.0, 0.8, 0.63, 0.5, 0.4, 0.31, 0.25, 0.16, 0.1], np.float32)
"""Parts of the observed range that a clipped one may keep."""

WHOLE = ("k_cache", "k_rows", "keys", "logits")
"""Last parts of the names of keys and logits, never clipped (`calibrate.ranges.WHOLE`)."""
LENGTHS = ("squares", "sum", "root", "inv_root", "inv")
"""Last parts of the names of what a norm divides by: in float here, as norms are taken twice where
tokens differ too much in length for once (`transform.double_norms`)."""


@dataclass(frozen=True)
class Outliers:
    """Outliers of a text after a prefix.

    Attributes:
      ratio: largest peak of a token over the median token's, per layer.
      peak: largest absolute value of the residual stream.
      tokens: ids of outlier tokens, the most frequent first.
    """

    ratio: tuple[float, ...]
    peak: float
    tokens: tuple[int, ...]

    @property
    def worst(self) -> float:
        return max(self.ratio)

    @property
    def tame(self) -> bool:
        return self.worst <= OUTLIER_RATIO


@dataclass
class _Seen:
    """What has been seen of the watched tensors."""

    ratios: Float[np.ndarray, " layers"]
    peak: float = 0.0
    found: Counter[int] = field(default_factory=Counter)

    def look(self, layer: int, env: dict[str, Array], windows: Int[np.ndarray, "n t"]) -> None:
        self.peak = max(self.peak, float(jnp.abs(env["mlp.residual"]).max()))
        for name in WATCHED:
            largest = np.asarray(jnp.abs(env[name]).max(axis=-1))
            ratio = largest / np.median(largest)
            self.ratios[layer] = max(self.ratios[layer], ratio.max())
            self.found.update(windows[ratio > OUTLIER_RATIO].tolist())


@dataclass(frozen=True)
class Harm:
    """KL(original || model after a prefix), in nats a token: one entry per domain.

    Attributes:
      whole: activations quantized in ranges as wide as the values.
      clipped: in ranges that clip.
    """

    whole: tuple[float, ...]
    clipped: tuple[float, ...]

    @property
    def clips(self) -> bool:
        """Whether clipping does less harm."""
        return sum(self.clipped) < sum(self.whole)

    @property
    def least(self) -> float:
        return min(float(np.mean(self.whole)), float(np.mean(self.clipped)))


@dataclass(frozen=True)
class Bench:
    """What trials of one model share.

    Attributes:
      params: folded float parameters without prefix.
      bos: tokens that the original begins sequences with.
      domains: windows (N, T) of token ids, one array per domain, all of one shape.
      slots: places for prefix tokens. The mask hides those that a prefix does not fill, so that
        prefixes of all lengths share one compiled layer.
      beginnings: short windows whose outliers count too, `bench_beginnings`; None for none. Which
        first tokens stay massive behind a prefix, a few long windows do not show.
    """

    config: ModelConfig
    plan: BitPlan
    params: Params
    bos: tuple[int, ...]
    domains: tuple[Int[np.ndarray, "n t"], ...]
    slots: int
    beginnings: Int[np.ndarray, "m u"] | None = None

    @property
    def windows(self) -> Int[np.ndarray, "n t"]:
        return np.concatenate(self.domains)

    @cached_property
    def original(self) -> list[Float[Array, "t v"]]:
        """Logits of the original for each window: with its own BOS, without any other prefix."""
        params = add_prefix(self.config, self.plan, self.params, self.bos)
        dec = decoder(self.config, self.plan, self.windows.shape[1], len(self.bos))
        return [x for _, part in self._parts for x in _logits(dec, params, part)]

    @property
    def _parts(self) -> Iterator[tuple[int, Int[np.ndarray, "p t"]]]:
        """Where each part of the windows begins, and the part, as memory allows."""
        count, tokens = self.windows.shape
        size = windows_at_once(self.config, tokens, count, most=count)
        for start in range(0, count, size):
            yield start, self.windows[start : start + size]

    def outliers(
        self, tokens: tuple[int, ...], every: bool = True
    ) -> tuple[Outliers, tuple[float, ...]]:
        """Runs the model after a prefix in float.

        Args:
          every: look at all beginnings; otherwise only until a token is found to be an outlier,
            which tells already that the prefix does not tame them.

        Returns:
          Its outliers, and KL(original || it) of each domain.
        """
        seen = _Seen(np.zeros(self.config.num_layers))
        kls: list[float] = []
        for start, part in self._parts:
            for name, layer, env in self._passes(part, tokens, WATCHED):
                if name == "layers.":
                    seen.look(layer, env, part)
                elif name == "head.":
                    kls += self._kls(start, env["logits"])
        if self.beginnings is not None:
            for name, layer, env in self._passes(self.beginnings, tokens, WATCHED):
                if not every and seen.ratios.max() > OUTLIER_RATIO:
                    break
                if name == "layers.":
                    seen.look(layer, env, self.beginnings)
                    if layer == self.config.num_layers - 1:
                        break  # the head tells nothing more
        likely = tuple(token for token, _ in seen.found.most_common())
        return Outliers(tuple(map(float, seen.ratios)), seen.peak, likely), self._by_domain(kls)

    def harm(self, tokens: tuple[int, ...]) -> Harm:
        """Runs the model after a prefix with its activations quantized."""
        readings = []
        for edge in (whole_range, clipped_range):
            kls: list[float] = []
            for start, part in self._parts:
                (*_, (_, _, env)) = self._passes(part, tokens, (), edge)
                kls += self._kls(start, env["logits"])
            readings.append(self._by_domain(kls))
        return Harm(*readings)

    def _passes(
        self,
        windows: Int[np.ndarray, "n t"],
        tokens: tuple[int, ...],
        keep: tuple[str, ...],
        edge: EdgeOfBits | None = None,
    ) -> Iterator[tuple[str, int, dict[str, Array]]]:
        """Runs windows after a prefix: each graph's name prefix, its layer and what is kept."""
        dec = decoder(self.config, self.plan, windows.shape[1], self.slots)
        tables = shared_inputs(dec, held=len(tokens))
        rows = prefix_rows(self.config, self.plan, self.params, tokens, self.slots)
        ids = jnp.asarray(windows, jnp.int32)

        def kept(graph: Graph) -> tuple[str, ...]:
            return keep if graph is dec.layer else ()

        made = passes(dec, {**self.params, **rows}, ids, kept, tables=tables, edge=edge)
        for graph, layer, env in made:
            yield graph.prefix, layer, env

    def _kls(self, start: int, logits: Float[Array, "p t v"]) -> list[float]:
        """KL(original || logits) of each window from `start` on."""
        return [float(_kl(p, q)) for p, q in zip(self.original[start:], logits, strict=False)]

    def _by_domain(self, kls: list[float]) -> tuple[float, ...]:
        found = np.nan_to_num(kls, nan=RUINED, posinf=RUINED)
        return tuple(map(float, np.mean(np.reshape(found, (len(self.domains), -1)), axis=1)))


def _logits(dec: Decoder, params: Params, windows: np.ndarray) -> Float[Array, "b t v"]:
    (*_, (_, _, env)) = passes(dec, params, jnp.asarray(windows, jnp.int32), lambda _: ())
    return env["logits"]


@jax.jit
def _kl(p_logits: Float[Array, "t v"], q_logits: Float[Array, "t v"]) -> Float[Array, ""]:
    """KL(p || q), the mean over positions."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


# --- quantizing edges ---


def whole_range(bits: Tensors) -> Edge:
    """Makes an edge that quantizes activations in the range of their own values.

    Masked scores, whose scale follows from the scores', stay as they are.

    Args:
      bits: of a layer's tensors, by local name.
    """

    def edge(spec: TensorSpec, x: Array) -> Array:
        return _rounded(spec, x, bits[spec.name], jnp.float32(1)) if _rounds(spec) else x

    return edge


def clipped_range(bits: Tensors) -> Edge:
    """Makes an edge that quantizes activations of 8 bits or fewer in the part of their range that
    leaves the least squared error; keys and logits in all of it, as `calibrate_activations`."""

    def edge(spec: TensorSpec, x: Array) -> Array:
        if not _rounds(spec):
            return x
        own = bits[spec.name]
        if spec.name.rpartition(".")[2] in WHOLE or min(spec.quant.bits) > 8:
            return _rounded(spec, x, own, jnp.float32(1))
        errors = jax.lax.map(lambda s: jnp.sum(jnp.square(_rounded(spec, x, own, s) - x)), SHRINKS)
        shrink = jnp.where(own > 8, 1.0, jnp.asarray(SHRINKS)[jnp.argmin(errors)])
        return _rounded(spec, x, own, shrink)

    return edge


def _rounds(spec: TensorSpec) -> bool:
    """Whether trials quantize a tensor. One that is widened has the codes of another."""
    scope, _, last = spec.name.rpartition(".")
    length = last in LENGTHS and scope.endswith("norm")
    made = spec.kind == "activation" and not is_widened(spec.name)
    return made and last != "masked" and not length


def _rounded(spec: TensorSpec, x: Array, bits: Array, shrink: Array) -> Array:
    """x on a grid of so many bits over `shrink` times its range."""
    steps = (jnp.left_shift(1, bits) - 1).astype(jnp.float32)
    low, high = jnp.minimum(x.min(), 0) * shrink, jnp.maximum(x.max(), 0) * shrink
    bound = jnp.maximum(-low, high)
    symmetric = (bits > 8) | spec.quant.symmetric
    low, high = jnp.where(symmetric, -bound, low), jnp.where(symmetric, bound, high)
    step = jnp.maximum((high - low) / steps, np.float32(1e-30))
    return jnp.round(jnp.clip(x, low, high) / step) * step


def bench_windows(
    domains: Sequence[Int[np.ndarray, "_ _t"]], count: int, length: int
) -> tuple[Int[np.ndarray, "n t"], ...]:
    """Cuts `count` windows of at most `length` tokens from the start of each domain's text.

    All have the same shape; a domain without text is left out.
    """
    texts = [np.asarray(d).reshape(-1) for d in domains if np.size(d)]
    length = min(length, min(map(len, texts)))
    count = max(1, min(count, min(len(t) // length for t in texts)))
    return tuple(t[: count * length].reshape(count, length) for t in texts)


def bench_beginnings(
    domains: Sequence[Int[np.ndarray, "_ _t"]], count: int, length: int
) -> Int[np.ndarray, "m u"]:
    """Cuts `count` windows of `length` tokens from each domain's text, evenly apart."""
    texts = [np.asarray(d).reshape(-1) for d in domains if np.size(d)]
    length = min(length, min(map(len, texts)))
    rows = []
    for text in texts:
        firsts = np.unique(np.linspace(0, len(text) - length, count).astype(int))
        rows.append(text[firsts[:, None] + np.arange(length)])
    return np.concatenate(rows)
