"""Models whose layers are of several kinds, from quantization to the file: LiteRT's reference
kernels and the simulator agree on every element, with one prefill and with a cache."""

import jax.numpy as jnp
import kinds
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax import pipeline
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.integer.model import activation_scales, dequantize
from qnpu_jax.latency import cpu
from qnpu_jax.proof.verified import verify_file
from qnpu_jax.recipes import RECIPES
from qnpu_jax.runtime.litert_backend import LiteRTBackend
from qnpu_jax.runtime.session import Session
from qnpu_jax.runtime.simulator_backend import SimulatedBackend
from qnpu_jax.text.windows import Windows
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.interpreter import open_interpreter
from qnpu_jax.transform import Starts
from qnpu_sim import compile_model, run

CHUNK, CONTEXT, LENGTH = 4, 24, 18
IDS = tiny.random_ids((LENGTH,), 3)
cases = pairwise.parametrize(("name", "plan"), list(kinds.CONFIGS), ["w8a8", "w4a16"])
models = pytest.mark.parametrize("name", list(kinds.CONFIGS))


@pytest.mark.slow
@cases
def test_every_element_of_a_prefill_is_simulated(tmp_path, name, plan):
    model, path = kinds.quantized(name, plan), tmp_path / "m.tflite"
    writer.write_prefill(model, path, LENGTH)
    found = verify_file(path, model, IDS, "ref")
    assert found.differing == 0 and found.elements > 50_000


@pytest.mark.slow
@cases
def test_every_element_with_a_cache_is_simulated(tmp_path, name, plan):
    """Two chunks of 4 and 4 steps: the windows of 6 move past the first tokens."""
    model, path = kinds.quantized(name, plan), tmp_path / "m.tflite"
    cached.build_cached(model, CHUNK, CONTEXT).write(path)
    found = verify_file(path, model, IDS, "ref")
    assert found.differing == 0 and found.elements > 50_000


def fed(backend, parts) -> tuple[Session, np.ndarray]:
    """A session after IDS in these parts, and the logits of all of them."""
    session, at, logits = Session(backend), 0, []
    for count in parts:
        logits.append(session.step(IDS[at : at + count], count).logits)
        at += count
    return session, np.concatenate(logits)


@pytest.mark.slow
@cases
def test_chunks_and_steps_give_the_bits_of_one_prefill(tmp_path, name, plan):
    model = kinds.quantized(name, plan)
    long, expected = fed(SimulatedBackend(model, LENGTH, CONTEXT, "all"), (LENGTH,))
    parts = (4, 1, 1, 4, 4, 1, 1, 1, 1)
    cached.build_cached(model, CHUNK, CONTEXT, "all").write(tmp_path / "m.tflite")
    for backend in (
        SimulatedBackend(model, CHUNK, CONTEXT, "all"),
        LiteRTBackend(tmp_path / "m.tflite", "ref"),
    ):
        session, logits = fed(backend, parts)
        np.testing.assert_array_equal(logits, expected)
        np.testing.assert_array_equal(session.k, long.k)
        np.testing.assert_array_equal(session.v, long.v)


@pytest.mark.slow
@models
def test_all_layers_in_one_program_give_the_same_codes(name):
    model = kinds.quantized(name, "w8a8")
    dec, ids = model.decoder(LENGTH), tiny.random_ids((3, LENGTH))
    apart, at_once = (
        np.asarray(run(compile_model(model, dec, at_once=how), ids)["head.logits"])
        for how in (False, True)
    )
    np.testing.assert_array_equal(at_once, apart)


@pytest.mark.slow
@models
def test_fake_quantization_is_near_the_integers(name):
    """Layers that read another kind's tables would be as far apart as two models."""
    model = kinds.quantized(name, "w8a8")
    dec = model.decoder(LENGTH)
    codes = np.asarray(run(compile_model(model, dec), IDS)["head.logits"]).astype(np.float64)
    head = model.tensors["head.logits"]
    params = {n: jnp.asarray(x) for n, x in dequantize(model).items()}
    got = np.asarray(forward(dec, params, jnp.asarray(IDS), activation_scales(model)))
    expected = (codes - head.zero_point) * head.scale
    # Kernels round intermediate values that fake-quantization does not: a few codes of 255.
    assert np.abs(got - expected).mean() <= 2 * head.scale
    assert np.ptp(expected) > 100 * head.scale


@pytest.mark.slow
@pytest.mark.parametrize("name", pairwise.often(list(kinds.CONFIGS), ["three"]))
def test_a_whole_quantization_ends_in_an_equal_file(tmp_path, name):
    """Prefix search, calibration, weight rounding, freezing, writing: effort `none`."""
    config, ids = kinds.CONFIGS[name], tiny.random_ids((8, tiny.TOKENS), 5)
    recipe, params = RECIPES["w4a8"], kinds.checkpoint(config)
    prepared = pipeline.prepare(config, params, recipe)
    model = pipeline.quantize(config, prepared, recipe, Windows.of(ids), Starts()).model
    writer.write_prefill(model, tmp_path / "m.tflite", LENGTH)
    assert verify_file(tmp_path / "m.tflite", model, IDS, "ref").differing == 0


def test_inputs_of_a_cached_file_are_named_by_window(tmp_path):
    path = tmp_path / "m.tflite"
    cached.build_cached(kinds.quantized("three", "w4a16"), CHUNK, CONTEXT).write(path)
    details = open_interpreter(path, "ref").get_signature_runner("decode").get_input_details()
    cache = {f"kv_cache_{letter}_{i}" for letter in "kv" for i in range(4)}
    masks = {"mask", "mask_window_6", "keep", "keep_window_6"}
    assert details.keys() == {"ids", "positions", *masks, *cache}


def test_tables_lie_in_a_file_once_for_each_kind(tmp_path):
    path = tmp_path / "m.tflite"
    writer.write_prefill(kinds.quantized("three", "w8a8"), path, LENGTH)
    details = open_interpreter(path, "ref").get_tensor_details()
    names = [d["name"] for d in details if d["name"].startswith(("rope", "mask"))]
    assert sorted(names) == sorted(
        [f"rope.{n}{kind}" for n in ("cos", "sin") for kind in ("", "_kind_1", "_kind_2")]
        + ["mask", "mask_window_6"]
    )


def test_a_file_with_windows_can_be_timed(tmp_path):
    path = tmp_path / "m.tflite"
    cached.build_cached(kinds.quantized("partial", "w8a8"), CHUNK, CONTEXT).write(path)
    for tokens, call in cpu.calls(path, 1).values():
        assert call()["kv_slice_k_0"].shape == (1, tokens, 8)
