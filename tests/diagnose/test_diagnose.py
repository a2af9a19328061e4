"""Where precision is lost: sums against NumPy by hand, charges against what they must add up to,
and the command as a user meets it."""

import json
import shutil
import xml.etree.ElementTree as ET
from functools import cache

import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny
from workspace import change_tensors

from qnpu_jax import artifacts
from qnpu_jax.diagnose import attribution, heat_map, model_explorer, run, tensor_errors
from qnpu_jax.diagnose.summary import Tally
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.qparams import QParams
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.measure.perplexity import fake_quant_logits
from qnpu_jax.proof.simulated import Simulated

IDS = tiny.random_ids((tiny.TOKENS,), seed=5)
PLANS = pairwise.often(("w8a8", "w4a16", "mixed"), ("w8a8", "w4a16"))
RUINED = "layers.1.mlp.act"


def read(model: IntegerModel):
    """Constants, simulated codes and what `measure` finds in one window."""
    constants = tensor_errors.Constants.of(model, tiny.TOKENS)
    tensors = Simulated(model, tiny.TOKENS).tensors(IDS)
    return constants, tensors, tensor_errors.measure_window(constants, IDS, tensors)


@cache
def measured(plan: str):
    return read(tiny.quantized("gqa_llama3", plan))


def real(model: IntegerModel, codes: np.ndarray, name: str, layer: int) -> np.ndarray:
    """Codes of a layer's tensor in real numbers, float64."""
    tensor = model.decoder(1).layer.at(model.tensors[f"layers.{name}"], layer)
    return (codes.astype(np.float64) - float(tensor.zero_point)) * float(tensor.scale)


# One tensor.


@pytest.mark.parametrize(
    ("name", "inputs", "op"),
    [
        ("mlp.act", ("mlp.silu", "mlp.up"), np.multiply),
        ("attn.residual", ("attn.o", "input.residual"), np.add),
        ("attn.rope.q_cos", ("attn.rope.q",), None),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_op_alone_by_hand(name, inputs, op, layer):
    model = tiny.quantized("gqa_llama3", "w8a8")
    _, tensors, found = measured("w8a8")
    codes = {n: np.asarray(tensors.get(f"layers.{layer}.{n}", 0)) for n in (name, *inputs)}
    before = f"layers.{layer - 1}.mlp.residual" if layer else "embed.residual"
    codes["input.residual"] = np.asarray(tensors[before])
    x = [real(model, codes[n], n, layer) for n in inputs]
    if op is None:  # by the cosines, which are codes too
        dec = model.decoder(tiny.TOKENS)
        x.append(real(model, model.inputs(dec)["rope.cos"], "rope.cos", layer))
    expected = (op or np.multiply)(*x)
    got = real(model, codes[name], name, layer)
    sums = found.sums[f"layers.{layer}.{name}"]
    assert sums.own_signal == pytest.approx(np.sum(expected**2), rel=1e-5)
    # float32 sums of float32 differences: the noise of 16 bits is 1e-5 of what is subtracted
    assert sums.own_noise == pytest.approx(np.sum((got - expected) ** 2), rel=2e-2)
    assert sums.count == got.size
    low, high = codes[name].min(), codes[name].max()
    assert (sums.lowest, sums.highest) == (low, high)
    ends = np.iinfo(codes[name].dtype)
    assert sums.ends == np.sum((codes[name] == ends.min) | (codes[name] == ends.max))


def test_clipped_codes_are_counted_exactly():
    """Ten values far above the range, as simulated, of a tensor whose inputs are what they were."""
    model, constants = tiny.quantized("gqa_llama3", "w8a8"), measured("w8a8")[0]
    tensors = dict(measured("w8a8")[1])
    up = np.array(tensors["layers.1.mlp.up"])
    silu = np.array(tensors["layers.1.mlp.silu"])
    up.reshape(-1)[:10] = 127
    silu.reshape(-1)[:10] = 127
    tensors |= {"layers.1.mlp.up": up, "layers.1.mlp.silu": silu}
    product = real(model, up, "mlp.up", 1) * real(model, silu, "mlp.silu", 1)
    scale, zero = (
        model.tensors["layers.mlp.act"].scale[1],
        model.tensors["layers.mlp.act"].zero_point[1],
    )
    code = product / scale + zero
    expected = int(np.sum((code > 127.5) | (code < -128.5)))
    assert expected >= 10
    assert tensor_errors.measure_window(constants, IDS, tensors).sums[RUINED].clipped == expected


def test_sqnr_is_against_the_float_pass():
    """Evaluated another way: `passes` on the same constants."""
    constants, tensors, found = measured("w8a8")
    model = tiny.quantized("gqa_llama3", "w8a8")
    tables = {n: jnp.asarray(x) for n, x in constants.tables.items()}
    names = ("attn.q", "mlp.act")
    steps = passes(
        constants.decoder,
        constants.params,
        jnp.asarray(IDS[None]),
        lambda g: names if g.layered else (),
        tables=tables,
    )
    env = {}
    for graph, layer, env in steps:
        for name in names if graph.layered else ():
            sums = found.sums[f"layers.{layer}.{name}"]
            ref = np.asarray(env[name][0], np.float64)
            got = real(model, np.asarray(tensors[f"layers.{layer}.{name}"]), name, layer)
            noise = np.sum((got - ref) ** 2)
            expected = 10 * np.log10(np.sum(ref**2) / noise)
            assert tensor_errors.decibels(sums.signal, sums.noise) == pytest.approx(
                expected, abs=0.01
            )
    assert found.float_logits == pytest.approx(np.asarray(env["logits"][0]), abs=1e-5)


def test_decibels():
    assert tensor_errors.decibels(1000.0, 10.0) == pytest.approx(20.0)
    assert tensor_errors.decibels(1.0, 0.0) is None


def test_sums_of_two_windows():
    def sums(x: float) -> tensor_errors.Sums:
        return tensor_errors.Sums(
            count=x, signal=x, noise=x, own_signal=x, own_noise=x, ends=x, clipped=x,
            lowest=-x, highest=2 * x,
        )  # fmt: skip

    assert sums(1.0).merged(sums(4.0)) == sums(5.0)._replace(lowest=-4.0, highest=8.0)
    assert sums(4.0).merged(sums(1.0)) == sums(5.0)._replace(lowest=-4.0, highest=8.0)


@pytest.mark.parametrize("plan", PLANS)
def test_copies_lose_nothing_and_the_rest_is_charged(plan):
    constants, _, found = measured(plan)
    rounding = tensor_errors.rounding_tensors(constants.decoder)
    assert 0 < len(rounding) < len(found.sums)
    for name, sums in found.sums.items():
        if name not in rounding:
            assert sums.own_noise <= 1e-12 * sums.own_signal, name
            assert sums.clipped == 0, name
    assert set(found.errors) == {stacked for stacked, _ in rounding.values()}


def test_masked_keys_do_not_count():
    constants, _, found = measured("w8a8")
    mask = np.asarray(constants.tables["mask"])
    visible = int(np.sum(mask == 0))
    assert 0 < visible < mask.size
    for name in ("scores", "masked"):
        sums = found.sums[f"layers.0.attn.kv0.{name}"]
        assert sums.count == visible
        assert sums.clipped == 0
    assert found.sums["layers.0.attn.kv0.softmax"].count == mask.size


# The KL and whom it is charged to.


@pytest.mark.parametrize("plan", PLANS)
def test_the_simulator_is_the_float_pass_with_the_errors_added(plan):
    constants, _, found = measured(plan)
    logits = attribution.without(constants, IDS, found.errors)
    assert np.abs(found.logits - found.float_logits).max() > 1e-3
    assert logits == pytest.approx(np.asarray(found.logits), abs=1e-4)
    every = tensor_errors.rounding_tensors(constants.decoder)
    for exact in (
        attribution.without(constants, IDS, found.errors, every),
        attribution.replaced(constants, IDS, every),
    ):
        assert exact == pytest.approx(np.asarray(found.float_logits), abs=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_charges_add_up_to_the_kl(plan):
    """And gradients at the simulator to about twice that."""
    constants, _, found = measured(plan)
    total = attribution.kl(found.float_logits, found.logits)
    args = (constants, IDS, found.float_logits, found.errors)
    assert sum(x.sum() for x in attribution.charges(*args).values()) == pytest.approx(
        total, rel=1e-3
    )
    first = sum(x.sum() for x in attribution.slopes(*args, 1.0).values())
    assert first == pytest.approx(2 * total, rel=0.15)


def test_a_slope_is_a_difference():
    """df/dt of one tensor at t = 1, against a central difference of f in that tensor alone."""
    constants, _, found = measured("w8a8")
    args = (constants, IDS, found.float_logits, found.errors)
    slope = attribution.slopes(*args, 1.0)["layers.mlp.act"][1]

    def f(factor: float) -> float:
        errors = dict(found.errors)
        errors["layers.mlp.act"] = errors["layers.mlp.act"].at[1].multiply(factor)
        return attribution.kl(found.float_logits, attribution.without(constants, IDS, errors))

    assert slope == pytest.approx((f(1.1) - f(0.9)) / 0.2, rel=0.02)


def test_fake_quant_with_nothing_replaced():
    constants = measured("w8a8")[0]
    model = tiny.quantized("gqa_llama3", "w8a8")
    expected = np.asarray(fake_quant_logits(model)(IDS))
    np.testing.assert_allclose(attribution.replaced(constants, IDS), expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "reason"), [(24.0, "coarse"), (1 / 24, "clipped")])
def test_a_ruined_scale_comes_out_worst(factor, reason):
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    old = free["layers.mlp.act"]
    scale = np.array(old.scale)
    scale[1] *= factor
    ruined = {**free, "layers.mlp.act": QParams(scale=scale, zero_point=old.zero_point)}
    model = freeze(dec, params, ruined, tiny.PREFIX)
    constants = tensor_errors.Constants.of(model, tiny.TOKENS)
    simulator, tally = Simulated(model, tiny.TOKENS), Tally(constants)
    origin = tally.read(IDS, simulator.tensors(IDS), None)
    rows = {r.tensor: r for r in tally.rows()}
    total = tally.kl()["simulator"]
    worst = max(rows.values(), key=lambda r: r.kl or 0.0)
    assert worst.tensor == RUINED
    assert worst.kl is not None and worst.kl > 0.5 * total
    own = {n: r.own_sqnr for n, r in rows.items() if r.own_sqnr is not None}
    assert min(own, key=lambda n: own[n]) == RUINED
    assert (rows[RUINED].clipped > 0.2) == (reason == "clipped")
    assert (rows[RUINED].used < 0.1) == (reason == "coarse")
    errors = tensor_errors.measure_window(constants, IDS, simulator.tensors(IDS)).errors
    exact = attribution.kl(origin, attribution.without(constants, IDS, errors, [RUINED]))
    anew = attribution.kl(origin, attribution.replaced(constants, IDS, [RUINED]))
    assert max(exact, anew) < 0.5 * total
    other = attribution.replaced(constants, IDS, ["layers.0.mlp.act"])
    assert attribution.kl(origin, other) > 0.8 * total


def test_patterns_choose_what_rounds():
    constants = measured("w8a8")[0]
    assert run.matching(constants, ["layers.*.mlp.act"]) == [
        "layers.0.mlp.act",
        "layers.1.mlp.act",
    ]
    with pytest.raises(run.UserError, match=r"--replace layers.0.attn.q_heads: matches no"):
        run.matching(constants, ["head.logits", "layers.0.attn.q_heads"])


# The command.

DIAGNOSE = ["diagnose", "out", "--text", "text.txt", "--tokens", "16"]
DIAGNOSE += ["--windows", "2", "--exact", "2"]


@pytest.fixture(scope="module")
def diagnosed(made, tmp_path_factory):
    """A folder that `qnpu diagnose` wrote with the original at hand, and what was found."""
    request = run.DiagnosisRequest(
        made / "out", made / "text.txt", 16, 2, str(made / "model"), ("layers.1.mlp.gate",), 2
    )
    found = run.diagnose(request, Simulated, run.Observer())
    out = tmp_path_factory.mktemp("diagnosed") / "diagnosis"
    run.write_diagnosis(found, out, heat_map.draw)
    return out, found


def test_the_report_holds_every_tensor(diagnosed):
    out, found = diagnosed
    report = json.loads((out / "diagnosis.json").read_text())
    assert report["format"] == run.FORMAT
    assert report["reference"]["logits"] == "model"
    assert report["text"]["windows"] == [2, 16]
    assert len(report["replaced"]) == 3
    assert report["replaced"][0]["tensor"] == "layers.1.mlp.gate"
    table = report["tensors"]
    assert {"layers.attn.q", "layers.mlp.act", "head.logits", "embed.out"} <= table.keys()
    assert set(table["layers.mlp.act"]) == {
        "op", "bits", "sqnr", "own_sqnr", "ends", "clipped", "used", "kl", "error", "by_design"
    }  # fmt: skip
    charged = sum(np.sum(t["kl"]) for t in table.values() if t["kl"] is not None)
    kl = report["kl"]
    assert charged == pytest.approx(kl["simulator"] - kl["constants"], rel=1e-2)
    assert table["layers.attn.q_heads"]["kl"] is None
    assert table["layers.attn.kv0.masked"]["by_design"] is None
    assert "kernel fixes" in table["layers.attn.kv0.softmax"]["by_design"]
    assert table["layers.mlp.act"]["by_design"] is None
    assert sum(found.kinds().values()) == pytest.approx(charged / kl["simulator"], rel=1e-3)


def test_the_heat_map_shows_layers_and_tensors(diagnosed):
    out, found = diagnosed
    root = ET.fromstring((out / "heat_map.svg").read_text())
    shown = {"".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"attn.q", "mlp.act", "attn.kv1.probs", "layer"} <= shown
    assert "attn.q_heads" not in shown  # a copy
    names, grid = heat_map.table(found.rows, lambda r: r.own_sqnr)
    rows = {r.tensor: r.own_sqnr for r in found.rows}
    assert grid.shape == (len(names), 2)
    assert grid[names.index("mlp.act"), 1] == rows[RUINED]


@pytest.mark.filterwarnings("ignore")
def test_model_explorer_finds_every_tensor(diagnosed, made):
    """By its own loader of .tflite files and its own classes of node data."""
    adapter = pytest.importorskip("model_explorer.builtin_tflite_flatbuffer_adapter")
    builder = pytest.importorskip("model_explorer.node_data_builder")
    dacite = pytest.importorskip("dacite")
    path = str(made / "out" / "model.tflite")
    (collection,) = adapter.BuiltinTfliteFlatbufferAdapter().convert(path, {})["graphCollections"]
    (graph,) = collection.graphs
    names = {
        attr["value"]
        for node in graph["nodes"]
        for output in node.get("outputsMetadata", [])
        for attr in output["attrs"]
        if attr["key"] == "tensor_name"
    }
    for file in (run.SQNR_OVERLAY, run.SHARE_OVERLAY):
        text = (diagnosed[0] / file).read_text()
        data = json.loads(text)
        assert set(data) == {graph["id"]}
        node_data = builder.ModelNodeData(
            {k: dacite.from_dict(builder.GraphNodeData, v, dacite.Config(strict=True, cast=[float]))
             for k, v in data.items()}
        )  # fmt: skip
        results = data[graph["id"]]["results"]
        assert len(results) > 50
        assert results.keys() <= names
        assert json.loads(node_data.to_json_string())[graph["id"]]["results"] == results


def test_overlay_colours_rise():
    for colours in (model_explorer.SQNR, model_explorer.SHARE):
        values = [v for v, _ in colours]
        assert values == sorted(set(values))
    data = model_explorer.node_data("n", {"a": 1.5}, model_explorer.SQNR)[model_explorer.GRAPH]
    assert data["results"] == {"a": {"value": 1.5}}
    assert data["thresholds"][0] == {"value": 10, "bgColor": "#a50026"}


def test_diagnose_prints_the_worst_and_writes_a_folder(qnpu, here):
    status, out, err = qnpu(*DIAGNOSE, "--top", "3", "--model", "model")
    assert (status, err) == (0, "")
    assert "KL of 2 x 16 tokens" in out
    assert max(len(line) for line in out.splitlines() if "│" in line or "┃" in line) <= 80
    rows = [line for line in out.splitlines() if line.startswith("│ layers.")]
    assert len(rows) >= 3
    assert "weights and other constants" in out
    assert out.endswith("wrote out/diagnosis\n")
    written = {p.name for p in (here / "out" / "diagnosis").iterdir()}
    assert written == run.KIND.files
    before = {p.name: p.read_bytes() for p in (here / "out" / "diagnosis").iterdir()}
    assert qnpu(*DIAGNOSE, "--model", "model")[0] == 0  # replaced
    after = {p.name: p.read_bytes() for p in (here / "out" / "diagnosis").iterdir()}
    assert before == after
    assert qnpu("verify", "out")[0] == 0  # the folder is still what its report says
    artifacts.check_writable(here / "out", overwrite=True)  # and ours to replace
    assert not [*here.rglob("*.partial"), *here.rglob("*.old")]


def test_without_the_original_or_matplotlib(qnpu, here, monkeypatch):
    monkeypatch.setattr(heat_map, "drawable", lambda: False)
    status, out, err = qnpu(*DIAGNOSE, "--out", "found")
    assert status == 0
    assert "KL from the model's own constants in float, as its original is not at hand" in err
    assert 'no heat map, as matplotlib is missing: install qnpu\'s extra "figures"' in err
    assert "from own constants in float: simulator" in out
    assert {p.name for p in (here / "found").iterdir()} == run.KIND.files - {"heat_map.svg"}
    report = json.loads((here / "found" / "diagnosis.json").read_text())
    assert report["kl"]["constants"] == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nowhere", "nowhere/report.json: missing; expected an output folder of `qnpu quantize`"),
        ("out --text no.txt", "no.txt: no such file"),
        ("out --text text.txt --tokens 400000", "text.txt: "),
        ("out --tokens 600", "length: prefix"),
        ("out --tokens 1", "'--tokens': Input should be greater than or equal to 2"),
        ("out --replace layers.7.attn.q", "--replace layers.7.attn.q: matches no tensor that is"),
        (
            "out --out model",
            "model: holds config.json, so it is not ours to overwrite; expected",
        ),
        ("out --out text.txt", "text.txt: is a file; expected a folder; choose another --out"),
        ("out --model nobody", "nobody: no such file or folder"),
        ("out --model other", "other: not the model that out was quantized from, by its SHA-256"),
    ],
)
def test_diagnose_refuses(refused, here, args, message):
    shutil.copytree(here / "model", here / "other")
    change_tensors(here / "other", lambda t: t["model.norm.weight"].__imul__(2))
    assert message in refused("diagnose", *args.split())


def test_an_original_of_another_shape_is_refused(made):
    model = tiny.quantized("gqa_llama3", "w8a8")
    with pytest.raises(run.UserError, match="quantized from, by its shape"):
        run.original(str(made / "model"), made / "out", model)


def test_interrupted_it_leaves_nothing(qnpu, here, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(here.rglob("*"))
    monkeypatch.setattr(heat_map, "draw", stop)  # the last thing that is written
    status, out, err = qnpu(*DIAGNOSE, "--model", "model")
    assert (status, out) == (130, "")
    assert err == "qnpu: interrupted, nothing is left behind\n"
    assert sorted(here.rglob("*")) == before


def test_one_window_has_no_standard_error():
    found = run.ReplacedTensor("a", *run.mean([2.0]), *run.mean([1.0, 3.0]), 0.0)
    assert (found.kl, found.error) == (2.0, None)
    assert (found.fake_quant, found.fake_quant_error) == (2.0, pytest.approx(1.0))
