"""One kernel for the attention of a GPU gives the codes of its five ops."""

import contextlib
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph.ops import WIDENING
from qnpu_sim import elementwise, gpu_attention, kernels, op_constants
from qnpu_sim.all_layers import run_stack
from qnpu_sim.gpu_attention import KEYS, MOST_KEYS, REST, ROWS, Constants, chains
from qnpu_sim.kernels import OperandFacts
from qnpu_sim.op_constants import QuantizedType
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import Npu, Profile, rules_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
random_model = importlib.import_module("random_model")

M, K = 2 * ROWS, 64
INT8, INT16 = np.dtype(np.int8), np.dtype(np.int16)


def constants(rules, x_zero_point: int, probs_zero_point: int) -> Constants:
    """Scores that spread over thousands of codes, exponentials over the whole table."""

    def of(scale: float, zero_point: int = 0, bits: int = 16) -> QuantizedType:
        return QuantizedType(np.float32(scale), zero_point, bits)

    queries, keys, scores = of(0.02, x_zero_point), of(0.03), of(0.002)
    mask, masked, probs = of(0.01), of(0.0021), of(1 / 200, probs_zero_point, 8)
    values, mixed = of(0.04, 0, 8), of(0.02, -7, 8)
    made: tuple[Any, ...] = (
        op_constants.prepare_batch_matmul(queries, keys, scores, rules),
        op_constants.prepare_add(scores, mask, masked, rules),
        op_constants.prepare_softmax_int16(masked.scale, rules),
        op_constants.prepare_quantize(of(2**-15), probs, rules),
        op_constants.prepare_batch_matmul(probs, values, mixed, rules),
    )
    return Constants(*made)


def op_by_op(q, k, v, mask, c: Constants, zero_point: int):
    """The ops themselves, queries and keys widened as in the graph."""
    wide_q = ((q.astype(np.int16) - zero_point) * WIDENING)[None]
    wide_k = (k.astype(np.int16) * WIDENING)[None]
    scores = kernels.batch_matmul(
        wide_q, wide_k, c.scores, adj_y=True, facts=OperandFacts(True, True, y_is_symmetric=True)
    )
    masked = elementwise.add(scores, mask[None], c.mask)
    softmax = kernels.softmax_int16(masked, c.softmax)
    probs = elementwise.quantize(softmax, c.probs, dtype=INT8)
    mixed = kernels.batch_matmul(
        probs, v[None], c.mixed, adj_y=True, facts=OperandFacts(y_is_symmetric=True)
    )
    return scores, probs, mixed[0]


PROFILES = ("litert_ref", "npu", Npu(rounding="single", ties="even"))
NUMBERS = (1, REST - 1, KEYS, KEYS + 2, 2 * KEYS + REST + 1)
"""Of keys: blocks that are full, partly full and many."""


def few(numbers, profiles) -> list[pairwise.Row]:
    """Many keys: full blocks and a rest."""
    return [(numbers[-1], profiles[-1])]


@pytest.mark.slow
@pairwise.parametrize(("keys", "profile"), NUMBERS, PROFILES, choose=few)
def test_the_codes_are_those_of_the_ops(keys, profile):
    """With zero points; alone and in a batch."""
    rng = np.random.default_rng(keys)
    q = rng.integers(-128, 128, (3, M, K), np.int8)
    k = rng.integers(-127, 128, (3, keys, K), np.int8)
    v = rng.integers(-127, 128, (3, K, keys), np.int8)
    mask = np.where(rng.random((M, keys)) < 0.3, np.int16(-32512), np.int16(0))
    c = constants(rules_of(profile), 11, -128)
    with jax.enable_x64():
        c = jax.tree.map(jnp.asarray, c)

        def fused(q, k, v):
            return gpu_attention.attention(q, k, v, jnp.asarray(mask), c, interpret=True)

        batch = jax.vmap(fused)(*map(jnp.asarray, (q, k, v)))
        for i in range(3):
            x, y, z, m = map(jnp.asarray, (q[i], k[i], v[i], mask))
            scores, probs, expected = op_by_op(x, y, z, m, c, 11)
            assert expected.std() > 5
            assert keys == 1 or (scores.std() > 500 and probs.std() > 1), "nothing trivial"
            assert (batch[i] == expected).all()
    assert (np.asarray(fused_alone(q, k, v, mask, c)) == np.asarray(batch[0])).all()


def fused_alone(q, k, v, mask, c):
    with jax.enable_x64():
        x, y, z, m = map(jnp.asarray, (q[0], k[0], v[0], mask))
        return gpu_attention.attention(x, y, z, m, c, interpret=True)


CONFIG = dataclasses.replace(
    random_model.SMOLLM2,
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)


def found(
    plan: str | BitPlan,
    tokens: int,
    profile: Profile = "litert_ref",
    config: ModelConfig = CONFIG,
    layer: int = 1,
) -> list[str]:
    model = random_model.random_model(plan, config)
    dec = model.decoder(tokens)
    program = compile_model(model, dec, profile)
    return list(chains(dec.layer, layer, program.constants[1][layer]))


@pytest.mark.slow
def test_where_it_serves():
    """8-bit attention with 16-bit scores, in profiles that treat every element alike."""
    both = ["attn.kv0.mixed", "attn.kv1.mixed"]
    assert found("w8a8", 16) == found("w4a8", 32, "npu") == found("w8a8", 512) == both
    for plan in ("w8a16", "w4a16", "w8a8s8", "w8a8i8"):
        assert found(plan, 16) == []
    assert found("w8a8", 16, "litert_opt") == [], "vector code: by place"
    assert found("w8a8", 5) == [], "rows that do not fill a block"
    assert found("w8a8", MOST_KEYS) == [], "with the prefix more keys than registers hold"
    assert found("w8a8", 16, Npu(accumulator_bits=16, overflow="wrap")) == [], "sums that wrap"
    for size in (16, 24):
        narrow = dataclasses.replace(CONFIG, head_dim=size)
        assert found("w8a8", 16, config=narrow) == [], "products that tensor cores sum wrongly"


def test_layers_of_8_bits_beside_others_of_16():
    """What 16-bit probabilities need stands in all layers, and does nothing in those of 8."""
    assert found(tiny.HEADS, 16) == ["attn.kv0.mixed", "attn.kv1.mixed"]
    assert found(tiny.HEADS, 16, layer=0) == []


def test_not_where_something_else_reads_between():
    model = random_model.random_model("w8a8", CONFIG)
    dec = model.decoder(16)
    own = compile_model(model, dec).constants[1][0]
    chain = chains(dec.layer, 0, own)["attn.kv0.mixed"]
    reader = next(n for n in dec.layer.nodes if n.output == chain.outputs[3])
    again = dataclasses.replace(dec.layer[chain.outputs[3]], name="again")
    graph = dataclasses.replace(
        dec.layer,
        tensors=(*dec.layer.tensors, again),
        nodes=(*dec.layer.nodes, dataclasses.replace(reader, output="again")),
    )
    assert list(chains(graph, 0, own)) == ["attn.kv1.mixed"]


@pytest.mark.slow
def test_random_models_have_scores():
    """Widened codes at a scale that is not exact made all of them 0, and every speed that of one
    repeated exponential."""
    model = random_model.random_model("w8a8", CONFIG)
    program = compile_model(model, model.decoder(16))
    kept = run(program, tiny.random_ids((16,)), lambda name: name.endswith(".scores"))
    assert len(kept) == 1 + CONFIG.num_layers * CONFIG.num_kv_heads
    assert all(np.asarray(codes).std() > 10 for codes in kept.values())


def gpu() -> contextlib.AbstractContextManager:
    """What newer versions of JAX want to know of a GPU to compile for it where there is none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    kind = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
    device = jax.sharding.AbstractDevice(**kind)
    mesh = jax.sharding.AbstractMesh((1,), ("batch",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["w8a8", "heads"])
def test_it_is_made_for_a_gpu(monkeypatch, plan):
    """Lowered to Triton, once per group of heads, inside the one program of its layers."""
    model = random_model.random_model(tiny.PLANS[plan], CONFIG)
    dec = model.decoder(16)
    stacks = compile_model(model, dec).stacks
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    *_, stack = stacks[1]
    x = jnp.zeros((2, *dec.layer["input.residual"].shape), jnp.int16)
    with jax.enable_x64(), gpu():
        traced = jax.jit(run_stack, static_argnums=0).trace(dec.layer, stack, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == CONFIG.num_kv_heads
