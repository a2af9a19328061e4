"""`qnpu diagnose` as a user meets it: the report, its pictures, and what it refuses."""

import json
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny
from workspace import change_tensors

from qnpu_jax import artifacts
from qnpu_jax.diagnose import heat_map, model_explorer, run
from qnpu_jax.proof.simulated import Simulated

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


@pytest.mark.slow
@pytest.mark.nightly
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


@pytest.mark.nightly
def test_the_heat_map_shows_layers_and_tensors(diagnosed):
    out, found = diagnosed
    root = ET.fromstring((out / "heat_map.svg").read_text())
    shown = {"".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"attn.q", "mlp.act", "attn.kv1.probs", "layer"} <= shown
    assert "attn.q_heads" not in shown  # a copy
    names, grid = heat_map.table(found.rows, lambda r: r.own_sqnr)
    rows = {r.tensor: r.own_sqnr for r in found.rows}
    assert grid.shape == (len(names), 2)
    assert grid[names.index("mlp.act"), 1] == rows["layers.1.mlp.act"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.nightly
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


@pytest.mark.slow
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
    assert written == run.KIND.files - {run.SUGGESTED}
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
    assert {p.name for p in (here / "found").iterdir()} == run.KIND.files - {
        "heat_map.svg",
        run.SUGGESTED,
    }
    report = json.loads((here / "found" / "diagnosis.json").read_text())
    assert report["kl"]["constants"] == 0.0


@pytest.mark.slow
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
