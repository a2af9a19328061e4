"""The public face: it loads nothing until used, and gives what the command line gives."""

import dataclasses
import functools
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from workspace import EVAL_TOKENS, PREFILL, VOCAB, write_tiny_model
from workspace import request as job_request

import qnpu_jax as qnpu
from qnpu_jax import api, job, progress
from qnpu_jax.fakequant import forward
from qnpu_jax.graph import decoder
from qnpu_jax.integer import IntegerModel, storage
from qnpu_jax.learn import train
from qnpu_jax.measure import perplexity as readings
from qnpu_jax.proof import Simulated
from qnpu_jax.recipes import load_recipe
from qnpu_jax.runtime import Sampling
from qnpu_jax.text import excerpts, files, windows
from qnpu_jax.transform import fold_norms

NAMES = {
    *("load", "quantize", "write_tflite", "simulate", "verify"),
    *("perplexity", "divergence", "generate"),
    *("Recipe", "Stage", "Effort", "BitPlan", "ties", "RECIPES", "EFFORTS"),
    *("IntegerModel", "Npu", "UserError"),
}
README = Path(__file__).parent.parent / "README.md"

# --- the names, and when they are imported ---


def test_the_face_has_these_names_and_no_others():
    assert set(qnpu.__all__) == set(dir(qnpu)) == NAMES
    assert all(getattr(qnpu, name) is not None for name in NAMES)
    assert qnpu.quantize is api.quantize
    with pytest.raises(AttributeError, match="module 'qnpu_jax' has no attribute 'quantise'"):
        getattr(qnpu, "quantise")  # noqa: B009 - type checkers know that there is none


def test_importing_it_takes_a_tenth_of_a_second_and_loads_no_arrays():
    program = "import sys, qnpu_jax; print(*sys.modules)"
    seconds = []
    for _ in range(3):  # the first may have to read the disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "qnpu_jax" in modules
        assert not {"jax", "numpy", "flax"} & set(modules)
    assert min(seconds) < 0.1


def test_recipes_and_errors_wait_for_no_jax():
    program = "import sys, qnpu_jax as q; q.RECIPES, q.BitPlan, q.UserError; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "qnpu_jax.recipes" in modules
    assert not {"jax", "numpy"} & set(modules)


def test_both_packages_tell_type_checkers_that_they_are_typed():
    import qnpu_sim

    for package in (qnpu, qnpu_sim):
        assert (Path(str(package.__file__)).parent / "py.typed").is_file()


# --- what it makes is what the command line makes ---


@pytest.fixture(scope="module")
def checkpoint(made):
    return qnpu.load(str(made / "model"))


@pytest.fixture(scope="module")
def model(made) -> IntegerModel:
    """That of the command line."""
    return storage.load(made / "out")


@pytest.fixture(scope="module")
def ids(checkpoint, made) -> list[int]:
    return checkpoint.tokenizer.encode((made / "text.txt").read_text())


@pytest.fixture(scope="module")
def held_out(checkpoint) -> np.ndarray:
    """The windows that the command line scores."""
    text = excerpts.tokenized(None, checkpoint.tokenizer, VOCAB)
    return text.first(PREFILL, EVAL_TOKENS).windows


def assert_same(got: IntegerModel, expected: IntegerModel) -> None:
    assert (got.config, got.plan, got.prefix) == (expected.config, expected.plan, expected.prefix)
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        for field in ("codes", "scale", "zero_point"):
            a, b = (getattr(t, field) for t in (got.tensors[name], tensor))
            assert (a is None) == (b is None), name
            if a is not None:
                np.testing.assert_array_equal(a, b, err_msg=f"{name} {field}", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "documents", "windows", "lists"])
def test_every_form_of_a_text_gives_the_integers_of_the_command_line(
    made, checkpoint, model, ids, form
):
    recipe = load_recipe(made / "recipe.json")
    length = recipe.calibration_length
    cut = windows.cut(ids, length, len(ids) // length, "text")
    text = {
        "file": str(made / "text.txt"),
        "documents": files.read_text(made / "text.txt"),
        "windows": cut,
        "lists": cut.tolist(),
    }[form]
    assert len(cut) > recipe.calibration_tokens // length  # more than the recipe asks for
    assert_same(qnpu.quantize(checkpoint, str(made / "recipe.json"), text=text), model)


def test_another_text_gives_other_integers(made, checkpoint, model, ids):
    recipe = load_recipe(made / "recipe.json")
    other = qnpu.quantize(checkpoint, recipe, text=windows.cut(ids[-128:], 32, 4, "text"))
    with pytest.raises(AssertionError):
        assert_same(other, model)


@pytest.mark.slow
def test_a_pool_mixed_with_own_text_is_the_command_lines(made, checkpoint, model, tmp_path):
    recipe = dataclasses.replace(load_recipe(made / "recipe.json"), calibration_pool=320)
    asked = job_request(made, out=tmp_path / "out", recipe=recipe, own_share=0.5)
    report = job.run(asked, Simulated, progress.Observer())
    calibration = report["calibration"]
    assert calibration["source"] == "text.txt, 2 of 4 windows written by the model"
    assert (calibration["tokens"], calibration["pool"]) == (128, 320)
    assert len(report["coverage"]["windows"]) == len(report["coverage"]["curve"]) == 4
    chosen = qnpu.quantize(checkpoint, recipe, text=made / "text.txt", own_share=0.5)
    assert_same(chosen, storage.load(tmp_path / "out"))
    with pytest.raises(AssertionError):
        assert_same(chosen, model)


@pytest.mark.nightly
@pytest.mark.slow
def test_it_learns_as_the_command_line_does_on_text_that_the_model_writes(
    made, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "compile_stage", functools.cache(train.compile_stage))
    effort = qnpu.Effort("tiny", steps=4, batch=2, length=48, tokens=480, held_out=2)
    stages = (qnpu.Stage(learn=(("biases", 0.0003), ("unrotated", 0.01))),)
    recipe = dataclasses.replace(load_recipe(made / "recipe.json"), stages=stages)
    asked = job_request(made, recipe=recipe, effort=effort, calibration=None, out=tmp_path / "out")
    job.run(asked, Simulated, progress.Observer())
    told = []
    got = qnpu.quantize(
        checkpoint, recipe, effort=effort, progress=lambda *event: told.append(event)
    )
    assert_same(got, storage.load(tmp_path / "out"))
    assert [e for e in told if e[0] == "learn, stage 1"] == [
        ("learn, stage 1", step, 4) for step in (1, 2, 3, 4)
    ]
    assert ("calibration text", 0, 0) in told
    assert told.index(("calibrate", 0, 0)) < told.index(("learn", 0, 0))
    plain = qnpu.quantize(checkpoint, recipe)
    with pytest.raises(AssertionError):
        assert_same(plain, got)


def test_quantizing_is_silent(made, checkpoint, capfd):
    qnpu.quantize(checkpoint, made / "recipe.json", text=made / "text.txt")
    assert capfd.readouterr() == ("", "")


def test_the_file_is_that_of_the_command_line(made, model, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"an older file")
    qnpu.write_tflite(model, str(path), tokens=PREFILL)
    assert path.read_bytes() == (made / "out" / "model.tflite").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model.tflite"]


# --- what it runs ---


@pytest.mark.slow
def test_simulate(model, ids):
    ids = ids[:PREFILL]
    simulator = Simulated(model, PREFILL)
    every = simulator.tensors(np.asarray(ids, np.int32))
    logits = qnpu.simulate(model, ids)
    np.testing.assert_array_equal(logits, every["head.logits"], strict=True)
    kept = qnpu.simulate(model, jnp.asarray(ids), keep="layers.1.attn.kv?.scores")
    assert sorted(kept) == [
        "head.logits",
        "layers.1.attn.kv0.scores",
        "layers.1.attn.kv1.scores",
    ]
    for name, codes in kept.items():
        np.testing.assert_array_equal(codes, every[name], strict=True)
    both = qnpu.simulate(model, [ids, ids[::-1]])
    assert both.shape == (2, PREFILL, VOCAB)
    np.testing.assert_array_equal(both[0], logits)


@pytest.mark.slow
def test_simulate_in_another_profile(model, ids):
    codes = [
        qnpu.simulate(model, ids[:PREFILL], profile=profile)
        for profile in ("litert_ref", qnpu.Npu(table_entries=33))
    ]
    assert codes[0].shape == codes[1].shape
    assert not np.array_equal(*codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [{}, {"logits": "last"}, {"context": 40}, {"context": 40, "logits": "last"}],
    ids=["all", "last", "cached all", "cached last"],
)
def test_every_form_of_a_file_is_verified(model, ids, tmp_path, form):
    path = str(tmp_path / "model.tflite")
    qnpu.write_tflite(model, path, tokens=PREFILL, **form)
    found = qnpu.verify(model, path, ids)
    assert (found.differing, found.differences) == (0, ())
    # Chunks of 16, 1, 1, 16, 1, 1; ops of both signatures as in the graphs.
    assert found.tensors > (500 if "context" in form else 100)
    assert (
        str(found) == f"0 of {found.elements:,} elements differ, in 0 of {found.tensors:,} tensors"
    )


def test_a_folder_of_another_model_differs(made, model, ids):
    assert qnpu.verify(model, str(made / "out"), ids).differing == 0
    name = "layers.mlp.down.weight"
    codes = model.tensors[name].codes.copy()
    codes[1, 0, :] = -codes[1, 0, :]
    tensors = model.tensors | {name: model.tensors[name].replace(codes=codes)}
    found = qnpu.verify(dataclasses.replace(model, tensors=tensors), made / "out", ids)
    assert found.differing > 0
    assert found.differences[0].tensor == "layers.1.mlp.down"


def test_integers_are_scored_as_by_the_command_line(made, model, held_out):
    report = json.loads((made / "out" / "report.json").read_text())
    assert qnpu.perplexity(model, held_out) == report["perplexity"]["simulator"]


def test_a_checkpoint_is_scored_as_by_the_command_line(made, checkpoint, model, held_out):
    report = json.loads((made / "out" / "report.json").read_text())
    got = qnpu.perplexity(checkpoint, held_out.tolist(), prefix=model.prefix)
    # The command line's is rotated: the same function, in other float32 roundings.
    assert got == pytest.approx(report["perplexity"]["float"], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_reads_bos_before_each_window(checkpoint, held_out):
    """Against all logits of BOS and window in one sequence, and log p by NumPy."""
    config, bos = checkpoint.config, checkpoint.tokenizer.bos_id
    assert bos is not None
    params = {n: jnp.asarray(x) for n, x in fold_norms(config, checkpoint.params).items()}
    dec = decoder(config, qnpu.RECIPES["w8a8"].bits, 1 + PREFILL)
    total = 0.0
    for window in held_out:
        whole = jnp.asarray([bos, *window], jnp.int32)
        logits = np.asarray(forward(dec, params, whole, None), np.float64)[1:-1]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= log_p[np.arange(PREFILL - 1), window[1:]].sum()
    expected = np.exp(total / (len(held_out) * (PREFILL - 1)))
    got = qnpu.perplexity(checkpoint, held_out, prefix=[bos])
    assert got == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    without = qnpu.perplexity(checkpoint, held_out, prefix=())
    assert abs(got / without - 1) > 1e-3
    own = got if checkpoint.tokenizer.adds_bos else without  # the model's own rule
    assert qnpu.perplexity(checkpoint, held_out) == own


@pytest.mark.slow
def test_divergence(checkpoint, model, held_out):
    assert qnpu.divergence(model, model, held_out) == readings.Divergence(0.0, 1.0)
    found = qnpu.divergence(checkpoint, model, held_out)
    assert 0 < found.kl < 0.1
    assert 0.5 < found.top1 <= 1.0
    assert found == qnpu.divergence(checkpoint, model, held_out, prefix=model.prefix)
    away = qnpu.divergence(checkpoint, model, held_out, prefix=(*model.prefix, 7, 11))
    assert away.kl > found.kl


# --- what it generates ---


@pytest.fixture
def command(request):
    """The command line; its fixture has the library's name here."""
    return request.getfixturevalue("qnpu")


@pytest.mark.slow
def test_generate_is_the_command(here, command, checkpoint, model):
    prompt = "The statement"
    text = qnpu.generate(
        model, prompt, tokenizer=checkpoint.tokenizer, max_tokens=6, context=40, backend="sim"
    )
    options = "--raw --max-tokens 6 --prefill 39 --context 40 --backend sim"
    status, out, _ = command("generate", "out", "--prompt", prompt, *options.split())
    assert status == 0
    assert out == text + "\n"


def test_generate_draws_by_its_seed(checkpoint, model):
    def drawn(seed: int) -> str:
        sampling = Sampling(temperature=2.0, seed=seed)
        return qnpu.generate(
            model,
            "A",
            tokenizer=checkpoint.tokenizer,
            max_tokens=12,
            sampling=sampling,
            context=40,
        )

    assert drawn(1) == drawn(1) != drawn(2)


# --- what it prints, and the README ---


def test_models_print_as_one_line(checkpoint, model):
    for thing in (checkpoint, model):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 200
        assert "320" in repr(thing)


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    section = README.read_text().split("\n## As a library\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 6
    write_tiny_model(tmp_path / "model", layers=4)
    for old, new in {'"smollm2-135m"': '"model"', 'effort="fast"': 'effort="none"'}.items():
        assert example.count(old) == 1
        example = example.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"text": files.default_text()[:2000]}
    exec(example, names)
    codes, ids = names["codes"], names["ids"]
    assert (tmp_path / "model.tflite").is_file()
    assert {n.rsplit(".", 1)[0] for n in codes} >= {"layers.3.attn", "head"}
    assert codes["head.logits"].shape == (len(ids), VOCAB)
    assert qnpu.verify(names["model"], "model.tflite", ids).differing == 0
