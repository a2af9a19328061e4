"""The search for a prefix: which tokens, if any, tame the outliers and leave the output alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph import Params
from qnpu_jax.transform.prefix_trials import (
    Bench,
    Harm,
    Outliers,
    bench_beginnings,
    bench_windows,
)

FREQUENT = 4
"""Most frequent tokens, and most frequent outliers, that are tried for each place."""
QUANTIZED = 3
"""Prefixes of each length that are tried with quantized activations: those that look best in
float."""
WINDOWS, TOKENS = 4, 128
"""Windows of each domain, and tokens of a window, that a prefix is judged on."""
BEGINNINGS, BEGINNING_TOKENS = 128, 4
"""Further beginnings of each domain, and tokens of each, that are searched for outliers: a prefix
may take the sink of most windows, and leave it to one first token in fifty (SmolLM2-135M after a
comma: windows that begin with one; learning then ends at KL .19 in place of .06)."""
GAIN = 0.1
"""Least part by which a longer prefix must lower the harm."""
LEEWAY = 1.3
"""A prefix that tames the outliers may do so much more harm before learning than one that does
not: its ranges clip, and narrow ranges are what learning gains by (SmolLM2-135M in w8a8, 150 steps:
from KL .69 to .06 clipped, from .28 to .11 whole)."""


@dataclass(frozen=True)
class Starts:
    """How sequences of a model begin.

    Attributes:
      bos: tokens that the model's own rule puts first; none for most.
      candidates: tokens that may do well as a prefix: BOS, chat markers, a newline.
    """

    bos: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One prefix and what it does.

    Attributes:
      outliers: largest ratio of a token's peak to the median token's, in any layer; of a prefix
        that does not tame them, the largest seen until that was known.
      kl: KL(original || model after the prefix) in float, nats a token, one per domain.
      harm: the same with quantized activations; None where that was not tried.
    """

    tokens: tuple[int, ...]
    outliers: float
    kl: tuple[float, ...]
    harm: Harm | None = None


@dataclass(frozen=True)
class PrefixReport:
    """The chosen prefix and its effect.

    Attributes:
      tokens: ids; none where every prefix does more harm than it saves.
      before, after: largest ratio of a token's peak to the median token's, per layer, without the
        prefix and with it.
      peak_before, peak_after: largest absolute value of the residual stream.
      ok: with the prefix no token exceeds OUTLIER_RATIO times the median. Where False, static
        scales must hold outliers: warn, and clip nothing.
      clip: ranges that clip do less harm than whole ones, with nothing learned.
      trials: every prefix that was tried, the chosen one first.
    """

    tokens: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    peak_before: float
    peak_after: float
    ok: bool
    clip: bool
    trials: tuple[Trial, ...]


def find_prefix(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    domains: tuple[Int[np.ndarray, "_ _t"], ...],
    starts: Starts,
    longest: int,
) -> PrefixReport:
    """Chooses the tokens whose K and V go before every sequence, by what they do to the output.

    Token by token: of all candidates the one after which the quantized model is nearest to the
    original, until the outliers are tame. The model's own BOS alone, or nothing, is where it
    begins, and each token must lower that KL by GAIN.

    Candidates are those of `starts`, the most frequent tokens that are outliers, and the most
    frequent ones of the text: a common token can take a sink that rare ones compete for.

    Args:
      params: folded float parameters without prefix K/V.
      domains: text (N, T) of one domain each, without BOS.
      longest: largest number of tokens.
    """
    text = bench_windows(domains, WINDOWS, min(TOKENS, config.max_positions - longest))
    beginnings = bench_beginnings(domains, BEGINNINGS, BEGINNING_TOKENS)
    bench = Bench(config, plan, params, starts.bos, text, longest, beginnings)
    none = _judged(bench, _tried(bench, starts.bos))
    best, tried = none, [none.trial]
    last = none
    while not last.outliers.tame and len(last.trial.tokens) < longest:
        here = _longer(bench, last, [*starts.candidates, *none.outliers.tokens[:FREQUENT]])
        tried += [t.trial for t in here]
        last = min((t for t in here if t.trial.harm is not None), key=_score)
        if _score(last) > (1 - GAIN) * _score(best):
            break
        best = last = last if last.outliers.tame else _whole(bench, last)
    assert best.trial.harm is not None
    return PrefixReport(
        tokens=best.trial.tokens,
        before=none.outliers.ratio,
        after=best.outliers.ratio,
        peak_before=none.outliers.peak,
        peak_after=best.outliers.peak,
        ok=best.outliers.tame,
        clip=best.trial.harm.clips,
        trials=(best.trial, *(t for t in tried if t.tokens != best.trial.tokens)),
    )


def _longer(bench: Bench, last: _Tried, likely: list[int]) -> list[_Tried]:
    """Prefixes of one token more, the best in float first; those are judged."""
    frequent = [t for t, _ in Counter(bench.windows.ravel().tolist()).most_common(FREQUENT)]
    pool = dict.fromkeys((*likely, *last.outliers.tokens[:FREQUENT], *frequent))
    here = [_tried(bench, (*last.trial.tokens, token), every=False) for token in pool]
    here.sort(key=lambda t: (not t.outliers.tame, float(np.mean(t.trial.kl))))
    return [_judged(bench, t) for t in here[:QUANTIZED]] + here[QUANTIZED:]


@dataclass(frozen=True)
class _Tried:
    trial: Trial
    outliers: Outliers


def _tried(bench: Bench, tokens: tuple[int, ...], every: bool = True) -> _Tried:
    outliers, kl = bench.outliers(tokens, every)
    return _Tried(Trial(tokens, outliers.worst, kl), outliers)


def _whole(bench: Bench, tried: _Tried) -> _Tried:
    """The prefix with all of its outliers."""
    found = bench.outliers(tried.trial.tokens)[0]
    return _Tried(replace(tried.trial, outliers=found.worst), found)


def _judged(bench: Bench, tried: _Tried) -> _Tried:
    harm = bench.harm(tried.trial.tokens)
    return replace(tried, trial=replace(tried.trial, harm=harm))


def _score(tried: _Tried) -> float:
    """Harm by which prefixes are compared."""
    assert tried.trial.harm is not None
    return tried.trial.harm.least / (LEEWAY if tried.outliers.tame else 1.0)
