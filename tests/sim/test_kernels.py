"""Kernels against LiteRT's kernel sets: no element differs, on every op of the union."""

import warnings
from typing import Any, get_args
from zlib import crc32

import jax
import jax.extend.core
import numpy as np
import pairwise
import pytest
from kernel_cases import VARIANTS, Case, Variant, dtypes
from single_op import run_op

from qnpu_jax.errors import UserError
from qnpu_jax.graph import ops
from qnpu_jax.tflite.interpreter import KernelSet
from qnpu_sim import elementwise, kernels, op_constants
from qnpu_sim.op_constants import QuantizedType
from qnpu_sim.rounding import FixedScale, FixedScaleWide, ProfileName, rules_of

ELEMENTS = 20_000
"""At least as many output elements are compared for every variant."""
MORE = 100_000
"""At night."""

KERNELS: dict[ProfileName, KernelSet] = {
    "litert_ref": "ref",
    "litert_opt": "opt",
    "litert_xnn": "xnn",
}

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def cases(variant: Variant, elements: int):
    """Cases until they have so many output elements together; the same ones in every run."""
    rng = np.random.default_rng(crc32(str(variant).encode()))
    done = 0
    while done < elements:
        case = variant.case(rng)
        done += int(np.prod(case.output.shape))
        yield case


def test_every_op_has_a_case():
    assert {v.op for v in VARIANTS} == set(get_args(ops.Op))


def represented(case: Case, profile: ProfileName) -> tuple | None:
    """The constants, or None for an op that the kernel set refuses."""
    try:
        return case.constants(profile)
    except UserError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("elements", pairwise.often([ELEMENTS, MORE], [ELEMENTS]))
@pytest.mark.parametrize("profile", list(KERNELS))
@variants
def test_equals_the_interpreter(variant, profile, elements):
    kernel: Any = jax.jit(lambda *args: variant.kernel(*args))  # a cache of its own
    kinds = set()
    compared = 0
    with jax.enable_x64():
        for case in cases(variant, elements):
            model = (variant.code, variant.options, case.inputs, case.output, KERNELS[profile])
            constants = represented(case, profile)
            if constants is None:
                with pytest.raises(RuntimeError, match="XNNPACK"):
                    run_op(*model)
                continue
            y = np.asarray(kernel(*case.arrays, *constants))
            expected = run_op(*model)
            assert y.dtype == expected.dtype
            np.testing.assert_array_equal(y, expected)
            kinds.add(jax.tree.structure(constants))
            compared += y.size
    assert compared >= elements // 2
    assert kernel._cache_size() == len(kinds), "constants must be arguments, not compiled in"


@variants
def test_npu_profile_holds_only_integers(variant):
    case = next(cases(variant, 1))
    with jax.enable_x64():
        jaxpr = jax.make_jaxpr(variant.kernel)(*case.arrays, *case.constants("npu"))
    assert {d.kind for d in dtypes(jaxpr.jaxpr)} <= set("iub")


def results_fit(constants: tuple) -> bool:
    """Whether no fixed-point factor flushes to 0 and no result passes 2^31, where profiles differ.

    Wide accumulators have up to 41 bits here.
    """
    scales = [c.scale for c in constants if hasattr(c, "scale")]
    limits = {FixedScale: 0, FixedScaleWide: -10}
    return all((s.shift <= limits[type(s)]).all() and (s.multiplier > 0).all() for s in scales)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.op in (ops.FullyConnected, ops.Sqrt)], ids=str
)
def test_npu_profile_is_within_one_code_of_litert_ref(variant):
    kernel = jax.jit(variant.kernel)
    compared = 0
    with jax.enable_x64():
        for case in cases(variant, 10 * ELEMENTS):
            if compared < ELEMENTS and results_fit(case.constants("npu")):
                y, z = (kernel(*case.arrays, *case.constants(p)) for p in ("npu", "litert_ref"))
                difference = np.asarray(y).astype(np.int32) - np.asarray(z).astype(np.int32)
                assert np.abs(difference).max() <= 1
                compared += difference.size
    assert compared >= ELEMENTS


@pytest.mark.slow
@pytest.mark.parametrize("variant", pairwise.often(VARIANTS, VARIANTS[::3]), ids=str)
def test_vmaps_over_codes_and_constants(variant):
    drawn = list(cases(variant, 2 * int(np.prod(next(cases(variant, 1)).output.shape))))
    arguments = [(*c.arrays, *c.constants("litert_ref")) for c in drawn]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *arguments)
    with jax.enable_x64():
        batched = jax.jit(jax.vmap(variant.kernel))(*stacked)
        for y, args in zip(batched, arguments, strict=True):
            np.testing.assert_array_equal(y, jax.jit(variant.kernel)(*args))


def test_without_64_bits_the_kernels_raise():
    x = np.ones((2, 3), np.int8)
    types = (QuantizedType(np.float32(scale)) for scale in (1, 2))
    constants = op_constants.prepare_quantize(*types, rules=rules_of("npu"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # JAX warns that it truncates; production code may not see it
        with pytest.raises(RuntimeError, match="enable_x64"):
            jax.jit(lambda x, c: elementwise.quantize(x, c, dtype=np.int8))(x, constants)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [511, 512, 600, 4000])
@pytest.mark.nightly
def test_int8_softmax_of_many_equal_keys(keys):
    """From 512 on no probability is above half a code; LiteRT's reference ends the process."""
    x = np.concatenate([np.zeros(keys), np.full(90, -128)]).astype(np.int8)[None]
    for profile in ("litert_ref", "npu"):
        made = op_constants.prepare_softmax_int8(np.float32(0.1), rules_of(profile))
        with jax.enable_x64():
            got = np.asarray(kernels.softmax_int8(jax.numpy.asarray(x), made)).astype(int) + 128
        np.testing.assert_array_equal(got[0, :keys], 1 if keys == 511 else 0)
        np.testing.assert_array_equal(got[0, keys:], 0)
