"""Prefix tokens: attention sinks taken out of the graph, as constant keys and values.

The first token of a sequence (and a few special ones) grows activations hundreds of times larger
than all others, which no static scale can hold. Their K and V are computed once in float and stored
as constants; every later token attends to them and grows no sink of its own.

Reference: Chen et al., PrefixQuant (arXiv 2410.05265).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
"""Tokens of each kind that are tried for each place of the prefix."""
SEARCH_WINDOWS, SEARCH_TOKENS = 16, 1024
"""Windows that decide whether a prefix suffices; and tokens, from the start of these windows, on
which candidates are compared."""
WATCHED = ("mlp.act", "mlp.residual")
"""Tensors where massive activations arise (input of down) and where they stay (residual stream)."""


@dataclass(frozen=True)
class PrefixReport:
    """The chosen prefix and its effect.

    Attributes:
      tokens: ids; none where the text has no outliers, or where every prefix makes them worse.
      before, after: largest ratio of a token's peak to the median token's, per layer, without the
        prefix and with it.
      peak_before, peak_after: largest absolute value of the residual stream.
      ok: with the prefix no token exceeds OUTLIER_RATIO times the median. Where False, static
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
    """Chooses the tokens whose K and V go before every sequence.

    Greedy: BOS first, then whichever candidate lowers the worst ratio most, until no token exceeds
    OUTLIER_RATIO times the median at any layer. Where `longest` tokens do not suffice (`ok` is
    False then), the step with the lowest worst ratio counts, no prefix at all included.

    Candidates are the most frequent tokens that are outliers still or were at first, and the most
    frequent tokens of the text: a common token can take a sink that rare ones compete for.

    Args:
      params: folded float parameters without prefix K/V.
      windows: (N, T) ids of ordinary text, without BOS.
      bos: the id that sequences start with, None where the model has none.
      longest: largest number of tokens.
    """

    def outliers(tokens: tuple[int, ...], ids: np.ndarray) -> _Outliers:
        return _outliers(config, plan, params, ids, tokens, longest)

    tokens, before, after = _search(outliers, windows[:SEARCH_WINDOWS], bos, longest)
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
    """Outliers of a text after a prefix.

    Attributes:
      ratio: largest peak of a token over the median token's, per layer (L,).
      peak: largest absolute value of the residual stream.
      tokens: ids of outlier tokens, the most frequent first.
    """

    ratio: np.ndarray
    peak: float
    tokens: list[int]


def _search(
    outliers: Callable[[tuple[int, ...], np.ndarray], _Outliers],
    text: np.ndarray,
    bos: int | None,
    longest: int,
) -> tuple[tuple[int, ...], _Outliers, _Outliers]:
    """The greedy search of `find_prefix`: tokens, and the outliers without and with them."""
    sample = text[:, : SEARCH_TOKENS // len(text)]
    frequent = [token for token, _ in Counter(text.ravel().tolist()).most_common()]
    tokens: tuple[int, ...] = ()
    last = before = outliers(tokens, text)
    best = (tokens, before)
    while last.ratio.max() > OUTLIER_RATIO and len(tokens) < longest:
        pools = (last.tokens, before.tokens, frequent) if tokens or bos is None else ([bos],)
        candidates = dict.fromkeys(c for pool in pools for c in pool[:CANDIDATES])
        longer: list[tuple[int, ...]] = [(*tokens, c) for c in candidates]
        # On the start of the windows, where outliers show; whether they are gone, on all tokens.
        tokens = min(longer, key=lambda t: outliers(t, sample).ratio.max())
        last = outliers(tokens, text)
        if last.ratio.max() < best[1].ratio.max():
            best = (tokens, last)
    return best[0], before, best[1]


def _outliers(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    windows: np.ndarray,
    tokens: tuple[int, ...],
    slots: int,
) -> _Outliers:
    """Measures the outliers of windows after a prefix.

    Args:
      tokens: the prefix; it takes the first of `slots` places. The mask hides the others, so that
        prefixes of all lengths share one compiled layer.
    """
    dec = decoder(config, plan, windows.shape[1], slots)
    tables = shared_inputs(dec, held=len(tokens))
    params = {**params, **_keys_values(config, plan, params, tokens, slots)}
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
    """Adds the keys and values of a prefix to the parameters.

    Args:
      params: folded float parameters.
      tokens: P ids, at least one.

    Returns:
      The parameters with `layers.attn.prefix_k` (L, N, P, K), after RoPE, and
      `layers.attn.prefix_v` (L, N, K, P), float32.
    """
    rows = _keys_values(config, plan, params, tokens, len(tokens))
    return {**params, **{name: np.asarray(x) for name, x in rows.items()}}


def _keys_values(
    config: ModelConfig, plan: BitPlan, params: Params, tokens: tuple[int, ...], slots: int
) -> dict[str, jax.Array]:
    """`layers.attn.prefix_{k,v}` with `slots` places, the tokens in the first of them.

    The model is causal: what fills the other places changes nothing of those before.
    """
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
