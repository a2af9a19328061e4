"""Attention sinks taken out of the graph: outlier tokens become a constant prefix of keys and
values.

The first token of a sequence (and a few special ones) grows activations hundreds of times larger
than all others, which no static scale can hold. Their K and V are computed once in float and stored
as constants; every later token attends to them and grows no sink of its own (PrefixQuant, arXiv
2410.05265).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import passes, shared_inputs
from qnpu_jax.graph import Graph, Params, decoder

OUTLIER_RATIO = 64.0
"""A token is an outlier where its largest activation exceeds this multiple of the median
token's."""
CANDIDATES = 4
"""How many tokens of each kind are tried for each place of the prefix."""
SEARCH_WINDOWS, SEARCH_TOKENS = 16, 1024
"""The verdict is on this many windows; candidates are compared on the first tokens of each, this
many altogether."""
WATCHED = ("mlp.act", "mlp.residual")
"""Where massive activations are born (input of down) and where they live (the residual stream)."""


@dataclass(frozen=True)
class PrefixReport:
    """The chosen prefix and what it does.

    Attributes:
      tokens: ids; none where the text has no outliers, or where every prefix makes them worse.
      before, after: largest ratio of a token's peak to the median token's, per layer.
      peak_before, peak_after: largest absolute value of the residual stream.
      ok: no token exceeds OUTLIER_RATIO times the median after the prefix. Where False, static
        scales must hold outliers: warn, and clip nothing.
    """

    tokens: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    peak_before: float
    peak_after: float
    ok: bool


def find_prefix(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    windows: Int[np.ndarray, "n t"],
    bos: int | None,
    longest: int,
) -> PrefixReport:
    """Chooses a prefix.

    Greedy: BOS first, then whichever candidate lowers the worst ratio most, until no token exceeds
    OUTLIER_RATIO times the median at any layer. Where `longest` tokens do not suffice (`ok` is
    False then), the step with the lowest worst ratio counts, no prefix at all included.

    Candidates are the most frequent tokens that are outliers still or were at first, and the most
    frequent tokens of the text: a common token can take a sink that rare ones compete for. They are
    compared on the start of the windows, where outliers show; the verdict is on all of their
    tokens.

    Args:
      windows: (N, T) ids of ordinary text, without BOS.
      bos: the id a sequence starts with, None where the model has none.
      longest: at most this many tokens.
    """

    def outliers(tokens: tuple[int, ...], ids: np.ndarray) -> _Outliers:
        return _outliers(config, plan, params, ids, tokens, longest)

    text = windows[:SEARCH_WINDOWS]
    sample = text[:, : SEARCH_TOKENS // len(text)]
    frequent = [token for token, _ in Counter(text.ravel().tolist()).most_common()]
    tokens: tuple[int, ...] = ()
    last = before = outliers(tokens, text)
    best = (tokens, before)
    while last.ratio.max() > OUTLIER_RATIO and len(tokens) < longest:
        pools = (last.tokens, before.tokens, frequent) if tokens or bos is None else ([bos],)
        candidates = dict.fromkeys(c for pool in pools for c in pool[:CANDIDATES])
        longer: list[tuple[int, ...]] = [(*tokens, c) for c in candidates]
        tokens = min(longer, key=lambda t: outliers(t, sample).ratio.max())
        last = outliers(tokens, text)
        if last.ratio.max() < best[1].ratio.max():
            best = (tokens, last)
    tokens, after = best
    return PrefixReport(
        tokens=tokens,
        before=tuple(map(float, before.ratio)),
        after=tuple(map(float, after.ratio)),
        peak_before=before.peak,
        peak_after=after.peak,
        ok=bool(after.ratio.max() <= OUTLIER_RATIO),
    )


@dataclass(frozen=True)
class _Outliers:
    """Largest token peak over the median one per layer (L,), the largest residual, and the ids of
    outlier tokens, most frequent first."""

    ratio: np.ndarray
    peak: float
    tokens: list[int]


def _outliers(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    windows: np.ndarray,
    tokens: tuple[int, ...],
    slots: int,
) -> _Outliers:
    """Of the windows after a prefix, which takes the first of `slots` places; the mask hides the
    others, so that prefixes of all lengths share one compiled layer."""
    dec = decoder(config, plan, windows.shape[1], slots)
    past = decoder(config, plan, windows.shape[1], cache=slots)
    tables = shared_inputs(past, filled=len(tokens))
    params = {**params, **_rows(config, plan, params, tokens, slots)}
    ids = jnp.asarray(windows, jnp.int32)
    ratios = np.zeros(config.num_layers)
    peak = 0.0
    found: Counter[int] = Counter()

    def watched(graph: Graph) -> tuple[str, ...]:
        return WATCHED if graph is dec.layer else ()

    for graph, layer, env in passes(dec, params, ids, watched, tables=tables):
        if graph is dec.embed:
            continue
        peak = max(peak, float(jnp.abs(env["mlp.residual"]).max()))
        for name in WATCHED:
            largest = np.asarray(jnp.abs(env[name]).max(axis=-1))
            ratio = largest / np.median(largest)
            ratios[layer] = max(ratios[layer], ratio.max())
            found.update(windows[ratio > OUTLIER_RATIO].tolist())
        if layer == config.num_layers - 1:
            break  # the head is not looked at
    return _Outliers(ratios, peak, [token for token, _ in found.most_common()])


def add_prefix(
    config: ModelConfig, plan: BitPlan, params: Params, tokens: tuple[int, ...]
) -> Params:
    """The parameters with `layers.attn.prefix_k` (L, N, P, K), after RoPE, and `prefix_v`
    (L, N, K, P): of the prefix, in float."""
    rows = _rows(config, plan, params, tokens, len(tokens))
    return {**params, **{name: np.asarray(x) for name, x in rows.items()}}


def _rows(
    config: ModelConfig, plan: BitPlan, params: Params, tokens: tuple[int, ...], slots: int
) -> dict[str, jax.Array]:
    """`layers.attn.prefix_{k,v}` with `slots` places, the tokens in the first: tokens that follow
    change nothing of those before."""
    params = {k: v for k, v in params.items() if ".prefix_" not in k}
    dec = decoder(config, plan, slots)
    ids = np.zeros((1, slots), np.int32)
    ids[0, : len(tokens)] = tokens
    rows: dict[str, list[jax.Array]] = {"k": [], "v": []}
    for graph, _, env in passes(dec, params, jnp.asarray(ids), lambda g: g.outputs):
        if graph is dec.layer:
            for letter, stack in rows.items():
                stack.append(env[f"attn.{letter}_rows"][0])
    return {f"layers.attn.prefix_{x}": jnp.stack(stack) for x, stack in rows.items()}
