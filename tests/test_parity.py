"""The promises that tie the readings of one model together: fake-quant and simulator agree node by
node (P3), simulator and LiteRT in every code of every tensor (P4), and no float is left (P5)."""

import functools
import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from kernel_cases import dtypes

from qnpu_jax.fakequant.evaluate import fake_quant_edge
from qnpu_jax.graph.graph import Graph, is_identity
from qnpu_jax.graph.layered import local, ranges_of
from qnpu_jax.graph.ops import Rsqrt, Softmax, eval_op
from qnpu_jax.integer.model import IntegerModel, activation_scales, dequantize
from qnpu_jax.measure.perplexity import float_logits, integer_logits
from qnpu_jax.tflite import writer
from qnpu_jax.tflite.interpreter import KernelSet, LiteRT
from qnpu_sim.program import compile_model, run
from qnpu_sim.run_graph import run_graph

FEW = (("mha_tied", "w8a8"), ("gqa_llama3", "w4a16"), ("mqa_linear_bias", "mixed"))
KERNELS: dict[str, KernelSet] = {"litert_ref": "ref", "litert_opt": "opt", "litert_xnn": "xnn"}
IDS = tiny.random_ids((tiny.TOKENS,), 3)

Tensors = dict[str, np.ndarray]


def simulated(
    model: IntegerModel, ids: np.ndarray, profile: Any = "litert_ref", **sizes
) -> Tensors:
    """Codes of every tensor by global name."""
    program = compile_model(model, model.decoder(ids.shape[-1], **sizes), profile)
    return {n: np.asarray(x) for n, x in run(program, ids, lambda _: True).items()}


@functools.cache
def tiny_run(name: str, plan: str, profile: str) -> Tensors:
    return simulated(tiny.quantized(name, plan), IDS, profile)


def made(dec) -> dict[str, bool]:
    """Global name of every tensor that a node makes: is the node an identity in its layer?"""
    return {
        graph.global_name(layer, node.output): is_identity(graph, node, layer)
        for graph in dec.graphs
        for layer in range(graph.layers)
        for node in graph.nodes
    }


def report(line: str) -> None:
    """A count for the reader of `pytest -s` or of a failed test."""
    print(line)  # noqa: T201


# P4: the simulator is LiteRT.


def assert_same_as_litert(
    model: IntegerModel,
    ids: np.ndarray,
    got: Tensors,
    path,
    logits: Any = "all",
    kernels: KernelSet = "ref",
):
    """No element of any tensor differs, and no tensor that an op makes is left out.

    Kept tensors cut what XNNPACK takes into single ops; the logits of a run without are compared
    as well.
    """
    writer.write_prefill(model, path, len(ids), logits)
    interpreter = LiteRT(path, kernels, keep_tensors=True)
    output = interpreter.run(ids)
    np.testing.assert_array_equal(output, LiteRT(path, kernels, threads=2).run(ids))
    expected = dict(interpreter.tensors())
    nodes = made(model.decoder(len(ids), logits=logits))
    assert got.keys() == nodes.keys()
    compared = 0
    for name, identity in nodes.items():
        assert identity == (name not in expected), name
        if not identity:
            assert got[name].dtype == expected[name].dtype, name
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
            compared += got[name].size
    np.testing.assert_array_equal(output, got["head.logits"])
    report(f"{compared} codes compared, 0 differ")


WEIGHTS, ACTIVATIONS = slice(2), slice(2, None)
"""Parts of a plan's name: w4, a8s8."""


def covering(names, plans, kernels) -> list[pairwise.Row]:
    """Every pair of model, weight width, activation width and kernel set; `mixed` and `heads` once,
    and `apart` with each kernel set."""
    plain = [plan for plan in plans if plan not in ("mixed", "apart", "heads")]
    weights, activations = ([*dict.fromkeys(p[at] for p in plain)] for at in (WEIGHTS, ACTIVATIONS))
    rows = pairwise.pairs(names, weights, activations, kernels)
    made = [(name, w + a, k) for name, w, a, k in rows]
    apart = [(name, "apart", k) for name, k in zip(itertools.cycle(names), kernels, strict=False)]
    once = [(names[1], plan, kernels[0]) for plan in ("mixed", "heads")]
    return [*made, *once, *apart]


@pytest.mark.slow
@pairwise.parametrize(
    ("name", "plan", "profile"), tiny.NAMES, [*tiny.PLANS], [*KERNELS], choose=covering
)
def test_simulator_equals_litert_in_every_tensor(tmp_path, name, plan, profile):
    got, path = tiny_run(name, plan, profile), tmp_path / "m.tflite"
    assert_same_as_litert(tiny.quantized(name, plan), IDS, got, path, kernels=KERNELS[profile])
    assert len(np.unique(got["head.logits"])) > 30, "a model that says nothing proves nothing"


@pytest.mark.slow
def test_last_logits_equal_litert_and_the_last_row(tmp_path):
    name = "gqa_llama3"
    model = tiny.quantized(name, "w8a8")
    got = simulated(model, IDS, logits="last")
    assert_same_as_litert(model, IDS, got, tmp_path / "m.tflite", "last")
    every = tiny_run(name, "w8a8", "litert_ref")["head.logits"]
    np.testing.assert_array_equal(got["head.logits"], every[-1:])


@pytest.mark.slow
def test_without_a_prefix_simulator_equals_litert(tmp_path):
    model = tiny.quantized("gqa_llama3", "w4a8", ())
    assert "layers.attn.prefix_k" not in model.codes
    assert_same_as_litert(model, IDS, simulated(model, IDS), tmp_path / "m.tflite")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_batch_equals_its_sequences():
    name, plan = "mqa_linear_bias", "mixed"
    model = tiny.quantized(name, plan)
    ids = np.stack([IDS, tiny.random_ids((tiny.TOKENS,), 4), IDS[::-1]])
    batch = simulated(model, ids)
    alone = tiny_run(name, plan, "litert_ref")
    assert batch.keys() == alone.keys()
    for tensor, codes in batch.items():
        np.testing.assert_array_equal(codes[0], alone[tensor], err_msg=tensor)
    for tensor, codes in simulated(model, ids[2]).items():
        np.testing.assert_array_equal(batch[tensor][2], codes, err_msg=tensor)


@pytest.mark.slow
def test_what_is_kept_does_not_change_the_logits():
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(model, model.decoder(tiny.TOKENS))
    only = run(program, IDS)
    assert only.keys() == {"head.logits"}
    some = run(program, IDS, lambda n: n == "layers.1.mlp.act")
    assert some.keys() == {"head.logits", "layers.1.mlp.act"}
    expected = tiny_run("gqa_llama3", "w8a8", "litert_ref")
    for name, x in (some | only).items():
        np.testing.assert_array_equal(x, expected[name])


# P3: fake-quant is the simulator, node by node.


@functools.partial(jax.jit, static_argnums=0)
def fake_quantized(graph: Graph, values, scales, ranges) -> dict[str, jax.Array]:
    """Every node's output as codes, each fed the given real inputs (not those computed here)."""
    edge = fake_quant_edge(scales, ranges)
    out = {}
    for node in graph.nodes:
        y = edge(graph[node.output], eval_op(node.op, *(values[n] for n in node.inputs)))
        q = scales[node.output]
        out[node.output] = jnp.round(y / q.scale) + q.zero_point
    return out


def node_by_node(model: IntegerModel, dec, ids: np.ndarray, codes: Tensors):
    """Yields graph, layer, node, and the codes of fake-quant and simulator."""
    scales, params, shared = activation_scales(model), dequantize(model), model.inputs(dec)
    residual = "embed.residual"
    for graph in dec.graphs:
        own, q = local(params, graph.prefix), local(scales, graph.prefix)
        bounds = ranges_of(graph, q)
        for layer in range(graph.layers):
            if graph.layered:
                p, s, r = jax.tree.map(lambda a, i=layer: a[i], (own, q, bounds))
            else:
                p, s, r = own, q, bounds
            held = {n: codes[graph.global_name(layer, n.output)] for n in graph.nodes}
            held = {n.output: x for n, x in held.items()}
            held |= {n: x for n, x in shared.items() if n in s}
            if graph is not dec.embed:
                held["input.residual"] = codes[residual]
            real = {
                n: (jnp.asarray(x, jnp.float32) - s[n].zero_point) * s[n].scale
                for n, x in held.items()
            }
            values = {"ids": jnp.asarray(ids), **real, **p}
            got = fake_quantized(graph, {n: jnp.asarray(v) for n, v in values.items()}, s, r)
            for node in graph.nodes:
                if not is_identity(graph, node, layer):
                    yield graph, layer, node, np.asarray(got[node.output]), held
            residual = graph.global_name(layer, graph.outputs[0])


def allowed(model: IntegerModel, graph: Graph, layer: int, node, held: Tensors) -> Any:
    """How many codes an element may differ by: 1, but for two int16 kernels that are tables."""
    narrow = tiny.bits_of(graph, node.output, layer) == 8
    if not isinstance(node.op, Softmax | Rsqrt) or narrow:
        return 1
    x = held[node.inputs[0]].astype(np.float64)
    if isinstance(node.op, Softmax):
        # exp is a table that ends at exp(-10), where it says 2 of 32,768: each of the keys that is
        # masked, or as far below the maximum, takes 2 codes from the others, and rounds by 1/2.
        # What interpolating exp and 1/x adds is (10/512)^2 / 8 of at most 32,768: 2 codes.
        return 2.5 * x.shape[-1] + 2
    # Linear between samples 128 codes apart: at most 128^2 / 8 times the second derivative,
    # 3/4 y / x^2, which is largest where the interval starts. Five roundings by half a code: of a
    # sample, of the two terms of its correction, of the interpolation (`qnpu_sim.tables`), of
    # fake-quant.
    assert x.min() >= 128, "the first interval of the table means nothing"
    scales = (model.tensors[graph.prefix + n].scale for n in (node.inputs[0], node.output))
    s_x, s_y = (float(s[layer] if graph.layered else s) for s in scales)
    start = np.floor(x / 128) * 128
    here, following = (1 / np.sqrt(s_x * (start + d)) / s_y for d in (0, 128))
    curvature = 128**2 / 8 * 0.75 / start**2 * here
    # A sample beyond the output's range saturates, and pulls the values of its interval down.
    share = (x - start) / 128
    lost = (1 - share) * np.maximum(here - 32767, 0) + share * np.maximum(following - 32767, 0)
    return 2.5 + curvature + lost


def assert_fake_quant_is_simulator(model: IntegerModel, ids: np.ndarray, codes: Tensors) -> None:
    count = defaultdict(lambda: np.zeros(3, np.int64))
    dec = model.decoder(len(ids))
    for graph, layer, node, got, held in node_by_node(model, dec, ids, codes):
        difference = np.abs(got - held[node.output])
        name = graph.global_name(layer, node.output)
        limit = allowed(model, graph, layer, node, held)
        assert np.all(difference <= limit), (
            f"{name}: {difference.max()} codes, allowed {np.max(limit)}"
        )
        row = count[f"{type(node.op).__name__} int{tiny.bits_of(graph, node.output, layer)}"]
        row += np.asarray([np.count_nonzero(difference), difference.size, 0])
        row[2] = max(row[2], difference.max())
    for op, (differ, size, largest) in sorted(count.items()):
        report(f"{op}: {differ} of {size} differ, by at most {largest}")
    moved = sum(row[0] for op, row in count.items() if op.split()[0] in MOVEMENT)
    assert moved == 0 and len(count) >= 10
    # Rounding differs where a product falls near a tie; systematic differences would be everywhere.
    for op in ("FullyConnected int8", "Mul int8", "Requantize int8", "Add int16"):
        differ, size, _ = count[op]
        assert differ <= 0.03 * size, op


MOVEMENT = ("Embedding", "Reshape", "Transpose", "Slice", "Concat")


@pytest.mark.slow
@pairwise.parametrize(("case", "profile"), FEW, ("litert_ref", "npu"), choose=pairwise.levels)
def test_fake_quant_is_within_one_code_of_the_simulator(case, profile):
    name, plan = case
    model = tiny.quantized(name, plan)
    assert_fake_quant_is_simulator(model, IDS, tiny_run(name, plan, profile))


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise.often(FEW, FEW[:1]))
def test_rounding_profiles_differ_less_than_quantization_does(case):
    """A fixed-point FULLY_CONNECTED or SQRT differs by one code from the floating-point one, and
    what follows is rounded anew: differences spread like quantization noise. So they must stay
    below it, and the npu profile must lie as near to the float model."""
    name, plan = case
    model = tiny.quantized(name, plan)
    dec, params, _ = tiny.calibrated(name, plan)
    x = np.asarray(float_logits(dec.config, dec.plan, params)(IDS))
    runs = {p: tiny_run(name, plan, p)["head.logits"] for p in ("litert_ref", "npu")}
    ref, npu = (np.asarray(integer_logits(model, lambda _, c=c: c)(IDS)) for c in runs.values())
    distance = np.abs(runs["npu"].astype(np.int64) - runs["litert_ref"])
    report(
        f"{np.count_nonzero(distance)} of {distance.size} logits differ, by {distance.max()} codes"
    )

    def rms(error: np.ndarray) -> float:
        return float(np.sqrt(np.mean(error**2)))

    assert rms(npu - ref) < 0.7 * rms(ref - x)
    # Two draws of the same noise over 2,304 logits that share much of it.
    assert rms(npu - x) == pytest.approx(rms(ref - x), rel=0.15)


# P5: integers only.


@pytest.mark.slow
@pytest.mark.parametrize("plan", tiny.OFTEN)
def test_npu_profile_of_whole_layers_holds_no_float(plan):
    model = tiny.quantized("gqa_llama3", plan)
    dec = model.decoder(5)

    def kinds(profile) -> set[str]:
        program = compile_model(model, dec, profile)
        found = set()
        for graph, codes, constants in zip(
            dec.graphs, program.codes, program.constants, strict=True
        ):
            for layer in range(graph.layers):
                residual = np.zeros((5, 48), np.int8 if "i8" in plan else np.int16)
                fed = {"ids": IDS[:5]} if graph is dec.embed else {"input.residual": residual}
                trace = jax.make_jaxpr(functools.partial(run_graph, graph, layer))
                with jax.enable_x64():
                    jaxpr = trace(codes[layer] | fed, constants[layer])
                assert len(jaxpr.jaxpr.eqns) > 1
                found |= {d.kind for d in dtypes(jaxpr.jaxpr)}
        return found

    assert kinds("npu") <= set("iub")
    assert "f" in kinds("litert_ref"), "this check sees floats where there are some"


COMMON = {
    "GATHER", "RESHAPE", "BATCH_MATMUL", "ADD", "SQRT", "RSQRT", "MUL", "FULLY_CONNECTED", "SLICE",
    "CONCATENATION", "TRANSPOSE", "SOFTMAX", "LOGISTIC", "QUANTIZE",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plan", tiny.PLANS)
def test_the_file_holds_no_float_and_only_the_ops_it_should(tmp_path, plan):
    model = tiny.quantized("mqa_linear_bias", plan)
    path = tmp_path / "m.tflite"
    writer.write_prefill(model, path, tiny.TOKENS)
    interpreter = Interpreter(model_path=str(path))
    used = {np.dtype(d["dtype"]).name for d in interpreter.get_tensor_details()}
    # No model this small needs a bias of 64 bits, and an i8 one has nothing wider than bytes but
    # biases and indices.
    assert used - {"int4"} == {"int8", "int32"} | (set() if "i8" in plan else {"int16"})
    stored: Any = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    assert {names[c.builtinCode] for c in stored.operatorCodes} == COMMON
    types = {t.type for t in stored.subgraphs[0].tensors}
    assert (schema.TensorType.INT4 in types) == plan.startswith("w4")
    floats = {schema.TensorType.FLOAT32, schema.TensorType.FLOAT16, schema.TensorType.FLOAT64}
    assert not types & floats
