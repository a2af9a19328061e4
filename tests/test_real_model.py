"""SmolLM2-135M, on one output folder of the README's first command (on a little text): what
the command says, and what is proved of the model in it. The whole command: `test_same_bytes`."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import without_stages
from test_parity import assert_fake_quant_is_simulator, assert_same_as_litert, simulated
from workspace import start

from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.integer import storage
from qnpu_jax.measure import perplexity, task_files, tasks
from qnpu_jax.measure.task_files import CHOICES, CONTEXTS, LAST_WORD, Item, Task
from qnpu_jax.measure.tasks import Scoring
from qnpu_jax.models.checkpoint import Checkpoint, load, resolve
from qnpu_jax.models.llama import expected_tensors
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text.dialogues import QUESTIONS
from qnpu_jax.text.files import default_text
from qnpu_jax.text.self_written import Drawing, Writer, calibration_windows, sample
from qnpu_jax.transform import channel_copies, channel_peaks, split_channels
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.prefix_trials import OUTLIER_RATIO

pytestmark = pytest.mark.slow

NAME = "smollm2-135m"
COMMAND = ["quantize", NAME, "--recipe", "recipe.json", "--out", "out/"]
LESS = ["--effort", "none", "--calibration", "text.txt", "--eval-tokens", "64", "--prefill", "32"]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[Path, str]:
    """The output folder, and what was printed."""
    folder = tmp_path_factory.mktemp("real")
    recipe = RECIPES["w8a8"].to_json() | {"calibration_tokens": 256, "calibration_length": 128}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "text.txt").write_text(default_text()[200_000:])
    process = start(*COMMAND, *LESS, cwd=folder)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, without_stages(err)) == (0, "")
    return folder / "out", out


@pytest.fixture(scope="module")
def report(said):
    return json.loads((said[0] / "report.json").read_text())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load(NAME)


@pytest.fixture(scope="module")
def real_run(said, checkpoint):
    """The model of the folder, 64 ids that did not calibrate it, and codes of every tensor."""
    model = storage.load(said[0])
    ids = np.asarray(checkpoint.tokenizer.encode(default_text()[:2_000])[:64], np.int32)
    return model, ids, simulated(model, ids)


# What the file of the package holds.


def test_config_shapes_and_hash(checkpoint):
    assert checkpoint.config == tiny.SMOLLM2
    shapes = {name: x.shape for name, x in checkpoint.params.items()}
    for tensor in expected_tensors(checkpoint.config):
        assert shapes.pop(tensor.param) == (*(30,) * tensor.per_layer, *tensor.shape)
    assert not shapes
    assert sum(x.size for x in checkpoint.params.values()) == 134_515_008
    assert checkpoint.source == NAME
    assert checkpoint.sha256 == hashlib.sha256(resolve(NAME).read_bytes()).hexdigest()


def test_values_are_those_of_the_gguf_package(checkpoint):
    stored = {t.name: t for t in gguf.GGUFReader(resolve(NAME)).tensors}
    embed, down = stored["token_embd.weight"], stored["blk.29.ffn_down.weight"]
    got, x = checkpoint.params["embed.weight"], gguf.dequantize(embed.data, embed.tensor_type)
    np.testing.assert_array_equal(got, x)
    got = checkpoint.params["layers.mlp.down.weight"][29]
    np.testing.assert_array_equal(got, gguf.dequantize(down.data, down.tensor_type))


# The command.


def test_first_command_of_the_readme(said, report):
    out, text = said
    assert report["verify"]["differing"] == 0
    assert report["verify"]["elements"] > 25_000_000  # a million for each of 32 tokens
    scores = report["perplexity"]
    assert scores["LiteRT"] == pytest.approx(scores["simulator"], rel=1e-6)
    assert scores["simulator"] < 2 * scores["float"]
    assert (out / "report.json").stat().st_size < 100_000
    for line in (
        f"│ simulator │ {scores['simulator']:.2f}",
        f"│ elements │ 0 of {report['verify']['elements']:,}",
        f"│ model.tflite │ {report['bytes'] / 1e6:.1f} MB",
        "│ total │ ",
    ):
        assert line in re.sub(" +", " ", text)
    assert max(map(len, text.splitlines())) <= 80


def test_no_massive_activations_after_the_prefix(report):
    prefix = report["prefix"]
    assert prefix["tokens"]
    assert len(prefix["before"]) == len(prefix["after"]) == 30
    assert max(prefix["before"]) > 1000 and prefix["peak_before"] > 1000, "what the prefix is for"
    assert prefix["ok"] and max(prefix["after"]) <= OUTLIER_RATIO
    assert prefix["peak_after"] < 1000


# The model of the folder.


@pytest.mark.nightly
def test_fake_quant_is_within_one_code_of_the_simulator_in_every_layer(real_run):
    assert_fake_quant_is_simulator(*real_run)


@pytest.mark.nightly
def test_every_tensor_of_30_layers_equals_litert(tmp_path, real_run):
    """As the command has compared them itself, but by the comparison of the tests."""
    model, ids, got = real_run
    assert_same_as_litert(model, ids, got, tmp_path / "m.tflite")


# The float model.


@pytest.fixture(scope="module")
def folded(checkpoint):
    """Float parameters with the norms' gammas in the weights."""
    return jax.device_put(fold_norms(checkpoint.config, dict(checkpoint.params)))


@pytest.mark.nightly
def test_it_names_paris(checkpoint, folded):
    tokenizer = checkpoint.tokenizer
    plan = tiny.PLANS["w8a8"]
    model = Writer(checkpoint.config, plan, folded)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    (row,) = sample(model, [prompt], len(prompt) + 32, Drawing(0, temperature=0.0))
    longer = row[len(prompt) :].tolist()
    answer = longer[: longer.index(tokenizer.eos_ids[0])]  # the model ended its turn
    assert "Paris" in tokenizer.decode(answer)
    # Past the end of its turn the model goes on, and must do so as the full forward does.
    dec, ids = decoder(model.config, plan, len(row)), jnp.asarray(row, jnp.int32)
    logits = jax.jit(lambda params: forward(dec, params, ids))(folded)
    assert longer == logits.argmax(axis=-1)[len(prompt) - 1 : -1].tolist()
    windows = calibration_windows(model, tokenizer, 2 * 64, 64, 0)
    texts = [tokenizer.decode(row.tolist()) for row in windows]
    assert texts[1].startswith("system\n") and QUESTIONS[0] in texts[1]


@pytest.mark.nightly
def test_channels_in_copies_are_the_same_model(checkpoint, folded):
    """The loudest channel of layer 2 reaches ten times further than the third."""
    ids, plan = checkpoint.tokenizer.encode(default_text()[:2_000])[:64], tiny.PLANS["w4a8"]
    windows = np.asarray(ids, np.int32)[None]
    dec = decoder(checkpoint.config, plan, 64)
    peaks = channel_peaks(dec, folded, windows).act
    config, split = split_channels(checkpoint.config, folded, channel_copies(peaks, 64))
    wider = decoder(config, plan, 64)
    fall = peaks.max(axis=1) / channel_peaks(wider, split, windows).act.max(axis=1)
    assert fall.min() > 1.05 and fall.max() > 5
    with jax.default_matmul_precision("highest"):
        before, after = (
            np.asarray(jax.jit(partial(forward, d))(p, jnp.asarray(windows[0])))
            for d, p in ((dec, folded), (wider, split))
        )
    # float32 sums of 1,600 terms and 30 layers in another order, of logits up to 36: 9e-5 seen.
    np.testing.assert_allclose(after, before, atol=3e-4)


def test_it_knows_a_few_things(checkpoint, folded):
    """Prompts of every kind through its own tokenizer, where the space is part of a token."""
    config = checkpoint.config
    logits = perplexity.float_logits(config, tiny.PLANS["w8a8"], folded)
    question, series = f"Question: Which animal barks?{task_files.ANSWER}", "one, two, three, four,"
    known = [
        Task("c", "", CHOICES, (Item(((question, " A dog"), (question, " A banana")), 0),)),
        Task("o", "", CONTEXTS, (Item((("Fish live in", " water."), ("Fire is", " water.")), 0),)),
        Task("w", "", LAST_WORD, (Item(((series, " five"),), 0),)),
    ]

    def score(batch_tokens, bos=None):
        scoring = Scoring(bos, (16,), batch_tokens)
        return tasks.score(logits, known, checkpoint.tokenizer, config.vocab_size, scoring)

    plain = score(batch_tokens=64)
    assert [result.headline for result in plain] == [1.0, 1.0, 1.0]
    # One at a time; 1e-4: float32 sums of 49152 terms and of 30 layers in another order.
    (*_, word) = score(batch_tokens=16)
    assert word.perplexity == pytest.approx(plain[2].perplexity, rel=1e-4)
    (*_, word) = score(batch_tokens=64, bos=checkpoint.tokenizer.bos_id)
    assert word.perplexity != plain[2].perplexity
