"""Sessions: chunks and single steps give the bits of one long prefill, in LiteRT and simulated."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.shared_inputs import layer_inputs, visible
from qnpu_jax.integer.model import dequantize
from qnpu_jax.proof.comparison import compare_tensors, op_names
from qnpu_jax.runtime.litert_backend import LiteRTBackend, mask_codes
from qnpu_jax.runtime.session import Session
from qnpu_jax.runtime.simulator_backend import SimulatedBackend
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.forms import Reals
from qnpu_jax.tflite.interpreter import open_interpreter

CHUNK, CONTEXT, LENGTH = 4, 24, 18
IDS = tiny.random_ids((LENGTH,), 3)
MIXES = {
    "single steps": (1,) * LENGTH,
    "chunks, then steps": (4, 4, 4, 4, 1, 1),
    "steps between chunks": (1, 4, 1, 1, 4, 4, 1, 1, 1),
}
PLANS = ("w8a8", "w4a8", "w4a8s8", "w8a8i8", "w4a16", "apart")


def file(folder: Path, plan: str, name: str, prefill: int = CHUNK) -> Path:
    path = folder / f"{name}-{plan}-{prefill}.tflite"
    if not path.exists():
        cached.build_cached(tiny.quantized(name, plan), prefill, CONTEXT, "all").write(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cached")


def fed(backend, parts) -> tuple[Session, np.ndarray]:
    """A session after IDS in these parts, and the logits of all of them."""
    session, at, logits = Session(backend), 0, []
    for count in parts:
        logits.append(session.step(IDS[at : at + count], count).logits)
        at += count
    assert session.filled == at == LENGTH
    return session, np.concatenate(logits)


@pytest.mark.slow
@pairwise.parametrize(("mix", "kernels", "plan"), list(MIXES), ["ref", "opt", "xnn"], PLANS)
def test_any_mix_gives_the_bits_of_one_prefill(folder, mix, kernels, plan):
    parts = MIXES[mix]
    whole = LiteRTBackend(file(folder, plan, "gqa_llama3", LENGTH), kernels)
    long, expected = fed(whole, (LENGTH,))
    session, logits = fed(LiteRTBackend(file(folder, plan, "gqa_llama3"), kernels), parts)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(session.k, long.k)
    np.testing.assert_array_equal(session.v, long.v)
    assert session.k[:, :, :LENGTH].any(axis=(1, 3)).all()
    assert not session.k[:, :, LENGTH:].any() and not session.v[..., LENGTH:].any()


def few(plans, names) -> list[pairwise.Row]:
    """Two models, in the plans of fewest and most tensors; and one whose layers differ."""
    return [*zip(("w8a8", "w4a16"), names[1:], strict=True), ("apart", names[1])]


@pytest.mark.slow
@pairwise.parametrize(("plan", "name"), PLANS, tiny.NAMES, choose=few)
def test_every_tensor_of_both_signatures_is_simulated(folder, plan, name):
    model = tiny.quantized(name, plan)
    backend = LiteRTBackend(file(folder, plan, name), "ref", keep_tensors=True)
    simulated = SimulatedBackend(model, CHUNK, CONTEXT, "all")
    session = Session(backend)
    for at, count in ((0, 4), (4, 1), (5, 4), (9, 1)):
        slots = CONTEXT - count
        ids, k, v = IDS[at : at + count], session.k[:, :, :slots], session.v[..., :slots]
        got = simulated.tensors(ids, at, k, v)
        session.step(ids, count)
        ops = op_names(cached.cached_decoder(model, count, CONTEXT, "all"))
        found = compare_tensors(backend.tensors(count), got, ops)
        assert found.differing == 0 and found.tensors == len(ops) > 100


@pytest.mark.slow
def test_a_prompt_is_fed_in_padded_chunks(folder):
    reference = LiteRTBackend(file(folder, "w8a8", "gqa_llama3"), "ref")
    _, expected = fed(reference, MIXES["single steps"])
    for backend in (
        reference,
        SimulatedBackend(tiny.quantized("gqa_llama3", "w8a8"), CHUNK, CONTEXT),
    ):
        session = Session(backend)
        np.testing.assert_array_equal(session.feed(IDS[:7].tolist()), expected[6])
        np.testing.assert_array_equal(session.feed([int(IDS[7])]), expected[7])
        np.testing.assert_array_equal(session.feed(IDS[8:].tolist()), expected[-1])
        assert session.room == CONTEXT - LENGTH


def test_the_context_can_be_filled_to_the_last_slot(folder):
    ids = tiny.random_ids((CONTEXT,), 4).tolist()
    backend = LiteRTBackend(file(folder, "w8a8", "gqa_llama3"))
    session, stepped = Session(backend), Session(backend)
    last = session.feed(ids)
    assert session.room == 0
    *_, logits = [stepped.feed([token]) for token in ids]
    np.testing.assert_array_equal(last, logits)
    with pytest.raises(UserError, match="1 tokens after 24; expected 1 to 0 more, in a context of"):
        session.feed([1])


@pytest.mark.parametrize("count", [0, CONTEXT + 1])
def test_a_prompt_that_does_not_fit_changes_nothing(folder, count):
    session = Session(LiteRTBackend(file(folder, "w8a8", "gqa_llama3")))
    with pytest.raises(UserError, match=f"prompt: {count} tokens after 0; expected 1 to 24 more"):
        session.feed([1] * count)
    assert session.filled == 0 and not session.k.any()


@pytest.mark.parametrize("plan", ["w8a8", "w8a8s8", "w8a16", "apart"])
@pytest.mark.parametrize("filled", [0, 7, CONTEXT - CHUNK])
def test_the_mask_is_that_of_the_decoder(filled, plan):
    model = tiny.quantized("gqa_llama3", plan)
    dec = cached.cached_decoder(model, CHUNK, CONTEXT)
    expected = model.inputs(dec, filled)
    seen = visible(CHUNK, len(model.prefix), dec.cache, filled)
    details = {n: {"shape": x.shape, "dtype": x.dtype} for n, x in expected.items()}
    got = mask_codes(seen, details)
    assert got.keys() == {n for n in expected if n.startswith(("mask", "keep"))}
    for name, codes in got.items():
        np.testing.assert_array_equal(codes, expected[name])


def test_signatures_share_their_weights():
    model = tiny.quantized("gqa_llama3", "w8a8")
    codes = sum(x.nbytes for x in model.codes.values())
    alone = len(writer.build_prefill(model, CHUNK).to_bytes()) - codes
    both = len(cached.build_cached(model, CHUNK, CONTEXT).to_bytes()) - codes
    # What is not weights is there once per signature, with rows of names for the cache.
    assert both < 3 * alone


def test_files_without_a_cache_are_refused(tmp_path):
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, CHUNK)
    with pytest.raises(UserError, match=r"signatures \['prefill_4'\]; expected prefill_<N> and"):
        LiteRTBackend(path)


@pytest.mark.parametrize("prefill", [CONTEXT, CONTEXT + 1])
def test_a_context_needs_room_for_a_cache(tmp_path, prefill):
    model = tiny.quantized("gqa_llama3", "w8a8")
    with pytest.raises(UserError, match=f"context: 24 positions for {prefill} new tokens"):
        cached.build_cached(model, prefill, CONTEXT).write(tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_float_export_is_the_dequantized_model(folder):
    model = tiny.quantized("gqa_llama3", "w8a8")
    path = folder / "float.tflite"
    cached.build_cached(model, CHUNK, CONTEXT, "all", Reals.of(model)).write(path)
    runner = open_interpreter(path, "opt").get_signature_runner(f"prefill_{CHUNK}")
    dec = cached.cached_decoder(model, CHUNK, CONTEXT, "all")
    inputs = {n: np.zeros(d["shape"], d["dtype"]) for n, d in runner.get_input_details().items()}
    inputs |= {"ids": IDS[:CHUNK], "positions": np.arange(CHUNK, dtype=np.int32)}
    got = runner(**inputs | {"mask": layer_inputs(dec)["mask"]})["logits"]
    params = jax.tree.map(jnp.asarray, dequantize(model))
    expected = forward(model.decoder(CHUNK), params, jnp.asarray(IDS[:CHUNK]))
    # float32 in another order of summation: a few ulp of logits near 5, through two layers.
    np.testing.assert_allclose(got, expected, atol=5e-5)
    assert {d["dtype"] for d in runner.get_output_details().values()} == {np.float32}
