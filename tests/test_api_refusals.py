"""Mistakes on the public face: each is refused at once, in one line that says what was expected.

They are made in a process of their own, as a user's program makes them: here the import hook of
conftest.py would find most of them first.
"""

import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import qnpu_jax as qnpu
from qnpu_jax import pipeline
from qnpu_jax.integer import storage
from qnpu_jax.text import Windows

checkpoint = qnpu.load("model")
model = storage.load(Path("out"))
tokenizer = checkpoint.tokenizer
plan = qnpu.RECIPES["w8a8"].bits
ids = tokenizer.encode(Path("text.txt").read_text())[:16]
windows = np.asarray([ids, ids])
said = []
for mistake in json.load(sys.stdin):
    try:
        got = eval(mistake)
        said.append(f"not refused: {got!r}")
    except qnpu.UserError as error:
        said.append(str(error))
    except Exception as error:
        said.append(repr(error))
print(json.dumps(said))
"""

MISTAKES = [
    ("qnpu.load(3)", "load: int 3; expected a folder, a .gguf file or a name"),
    ("qnpu.load(None)", "load: NoneType None; expected a folder"),
    ("tokenizer.encode('a' + chr(0xD800))", "text 'a\\ud800': holds half of a surrogate pair"),
    (
        "qnpu.write_tflite(model, None, tokens=16)",
        "path: expected a string or a Path; got NoneType; name a file",
    ),
    # Recipes, built in code.
    (
        "qnpu.Recipe('mine', plan, rotation='hadamrd')",
        "Recipe: rotation must be one of ['hadamard', 'none']; got 'hadamrd'; correct it",
    ),
    (
        "qnpu.Recipe('mine', plan, activation_init='mse2')",
        "Recipe: activation_init must be one of ['minmax', 'sigma', 'sigma-rotated', 'mse',"
        " 'class']; got 'mse2'; correct it",
    ),
    (
        "qnpu.Recipe('mine', {'*': 8})",
        "Recipe: bits must be a list of [pattern, bits] with bits in 2, 4, 8, 16, 32, 64; got"
        " {'*': 8}; correct it",
    ),
    ("qnpu.Recipe('mine', plan, stages=('gptq',))", "Recipe: stages[0]: expected a JSON object"),
    ("qnpu.Recipe('mine', plan, seed=1.5)", "Recipe: seed must be an integer from 0 to 4294967295"),
    ("qnpu.Stage(learn=(('rotations', 0.1),))", "Stage: learn must name groups of ['rotation', "),
    ("qnpu.Stage(loss='mse')", "Stage: loss must be one of ['kl', 'ce', 'hidden']; got 'mse'"),
    ("qnpu.Stage(share=2)", "Stage: share must be a number from 0 to 1; got 2; correct it"),
    ("qnpu.Effort('mine', steps=-1)", "Effort: steps must be an integer from 0 to 2147483647"),
    ("qnpu.Effort('mine', steps=1, batch=0)", "Effort: batch must be an integer from 1 to"),
    ("qnpu.Effort('mine', 1, without=('bits',))", "Effort: without must be a list of groups of ["),
    ("qnpu.Effort('mine', 1, precision='fp8')", "Effort: precision must be one of ['highest', "),
    (
        "qnpu.BitPlan({'*': 8})",
        "BitPlan: rules must be a list of [pattern, bits] with bits in 2, 4,",
    ),
    ("qnpu.BitPlan((('*', 7),))", "BitPlan: rules must be a list of [pattern, bits] with bits in"),
    ("qnpu.Npu(ties='down')", "ties: expected one of up, away, even; got down; choose one of them"),
    # Checkpoints, recipes, efforts.
    ("qnpu.load('nowhere')", "nowhere: no such file or folder; expected a Hugging Face folder"),
    (
        "qnpu.quantize('model')",
        "checkpoint: expected a Checkpoint; got 'model'; load it first: qnpu.load('model')",
    ),
    (
        "qnpu.quantize(Path('model'))",
        "checkpoint: expected a Checkpoint; got PosixPath; load it first: qnpu.load('model')",
    ),
    (
        "qnpu.quantize(model)",
        "checkpoint: expected a Checkpoint; got IntegerModel; pass what `load` gives",
    ),
    ("qnpu.quantize(checkpoint, 'w9a9')", "w9a9: no such recipe; expected one of ['w8a8', "),
    ("qnpu.quantize(checkpoint, 8)", "recipe: expected a name, a JSON file or a Recipe; got int"),
    (
        "qnpu.quantize(checkpoint, effort='quick')",
        "quick: no such effort; expected one of ['none',",
    ),
    ("qnpu.quantize(checkpoint, effort=60)", "effort: expected a name or an Effort; got int; see"),
    (
        "qnpu.quantize(checkpoint, progress=True)",
        "progress: expected a function or an Observer; got",
    ),
    # Text.
    ("qnpu.quantize(checkpoint, text='none.txt')", "none.txt: no such file; expected plain text"),
    (
        "qnpu.quantize(checkpoint, text='One line.\\nAnother.')",
        "text: 'One line.\\nAnother.'... is no path; expected a path, a list of strings, or windows"
        " of ids; put text itself in a list",
    ),
    ("qnpu.quantize(checkpoint, text=['short'])", "text: "),
    ("qnpu.quantize(checkpoint, own_share=0.5)", "own-share: 0.5 beside no other text; expected"),
    ("qnpu.quantize(checkpoint, text=windows, own_share=2.0)", "own-share: expected a number from"),
    ("qnpu.quantize(checkpoint, text=['', ' '])", "text: no text in it; expected at least one"),
    ("qnpu.quantize(checkpoint, text=[])", "text: no token; expected integer token ids of shape"),
    (
        "qnpu.quantize(checkpoint, text=ids)",
        "text: shape (16,); expected integer token ids of shape",
    ),
    ("qnpu.quantize(checkpoint, text=windows / 2)", "text: float64 values; expected integer token"),
    (
        "qnpu.quantize(checkpoint, text=windows[:, :4])",
        "text: 4 tokens in a row; expected 8 to 512",
    ),
    ("qnpu.quantize(checkpoint, text=[ids * 40])", "text: 640 tokens after a prefix of up to 6;"),
    ("qnpu.quantize(checkpoint, text=windows + 320)", "text: token "),
    (
        "qnpu.quantize(checkpoint, text=[ids], effort=qnpu.Effort('mine', 4, length=600))",
        "effort: 600 tokens after a prefix of up to 6; expected at most the model's 512 positions;"
        " choose another effort",
    ),
    (
        "pipeline.quantize(checkpoint.config, checkpoint.params, qnpu.RECIPES['w8a8'],"
        " Windows.of(windows), 0)",
        "head.bias: missing; expected [",
    ),
    # Files.
    (
        "qnpu.write_tflite(checkpoint, 'a.tflite')",
        "model: expected an IntegerModel; got Checkpoint; quantize it first",
    ),
    (
        "qnpu.write_tflite('out', 'a.tflite')",
        "model: expected an IntegerModel; got 'out'; pass what",
    ),
    ("qnpu.write_tflite(model, 'a.tflite', tokens=0)", "tokens: expected an integer from 2 to "),
    ("qnpu.write_tflite(model, 'a.tflite', tokens=1.5)", "tokens: expected an integer from 2 to "),
    ("qnpu.write_tflite(model, 'a.tflite', tokens=9999)", "tokens: expected an integer from 2 to "),
    ("qnpu.write_tflite(model, 'a.tflite', logits='first')", "logits: expected one of ['all', "),
    (
        "qnpu.write_tflite(model, 'a.tflite', tokens=16, context=16)",
        "context: expected an integer from 17 to ",
    ),
    (
        "qnpu.write_tflite(model, 'a.litertlm')",
        "a.litertlm: a plain .tflite would get this name; expected one that ends in .tflite;",
    ),
    ("qnpu.write_tflite(model, 'out')", "out: is a folder; expected a file; name one in it"),
    ("qnpu.write_tflite(model, 'no/a.tflite')", "no/a.tflite: its folder does not exist; expected"),
    # The simulator.
    ("qnpu.simulate(checkpoint, ids)", "model: expected an IntegerModel; got Checkpoint; quantize"),
    (
        "qnpu.simulate(model, 'text')",
        "ids: str_ values; expected integer token ids of shape (T,) or",
    ),
    (
        "qnpu.simulate(model, [])",
        "ids: no token; expected integer token ids of shape (T,) or (N, T)",
    ),
    ("qnpu.simulate(model, [ids, ids[:4]])", "ids: rows of unequal length; expected integer token"),
    (
        "qnpu.simulate(model, [5, 320])",
        "ids: token 320 is outside the model's vocabulary of 320; expected 0 to 319; take model and"
        " tokenizer of the same checkpoint",
    ),
    ("qnpu.simulate(model, [5, -1])", "ids: token -1 is outside the model's vocabulary of 320"),
    ("qnpu.simulate(model, [5] * 600)", "ids: 600 tokens in a row; expected 1 to "),
    ("qnpu.simulate(model, ids, keep='layer.1.*')", "keep='layer.1.*': expected a pattern of"),
    ("qnpu.simulate(model, ids, profile='arm')", "profile 'arm': expected one of litert_ref, "),
    # Proof.
    ("qnpu.verify(model, 'none.tflite', ids)", "none.tflite: no such file; expected a .tflite"),
    ("qnpu.verify(model, 'out', ids[:3])", "ids: 3 are too few for out/model.tflite; expected at"),
    (
        "qnpu.verify(model, 'out', windows)",
        "ids: shape (2, 16); expected integer token ids of shape",
    ),
    (
        "qnpu.verify(model, 'out', ids, 'gpu')",
        "kernels: expected one of ['ref', 'opt', 'xnn', 'tf']; got",
    ),
    # Measures.
    (
        "qnpu.perplexity('model', windows)",
        "model: expected a Checkpoint or an IntegerModel; got 'model'; pass what `load` or",
    ),
    (
        "qnpu.perplexity(model, windows * 0.5)",
        "windows: float64 values; expected integer token ids",
    ),
    (
        "qnpu.perplexity(model, ids)",
        "windows: shape (16,); expected integer token ids of shape (N,",
    ),
    ("qnpu.perplexity(checkpoint, [])", "windows: no token; expected integer token ids of shape"),
    ("qnpu.perplexity(checkpoint, [[5]])", "windows: 1 tokens in a row; expected 2 to "),
    ("qnpu.perplexity(checkpoint, windows + 320)", "windows: token "),
    (
        "qnpu.perplexity(checkpoint, [[5] * 600])",
        "windows: 600 tokens in a row; expected 2 to 512;",
    ),
    (
        "qnpu.perplexity(checkpoint, windows, prefix=[400])",
        "prefix: token 400 is outside the model's",
    ),
    ("qnpu.divergence(checkpoint, windows, windows)", "model: expected a Checkpoint or an Integer"),
    # Text out.
    (
        "qnpu.generate(model, 'A', tokenizer=None)",
        "tokenizer: expected a Tokenizer; got NoneType; pass checkpoint.tokenizer",
    ),
    (
        "qnpu.generate(model, '', tokenizer=tokenizer)",
        "prompt: no token; expected integer token ids",
    ),
    (
        "qnpu.generate(model, 'A', tokenizer=tokenizer, max_tokens=0)",
        "max_tokens: expected an integer from 1 to ",
    ),
    (
        "qnpu.generate(model, 'A list', tokenizer=tokenizer, context=9999)",
        "context: expected an integer from 3 to ",
    ),
    (
        "qnpu.generate(model, 'A long prompt', tokenizer=tokenizer, context=4)",
        "prompt: ",
    ),
    (
        "qnpu.generate(model, [{'role': 'user', 'content': 'Hi'}], tokenizer=tokenizer)",
        "model: no chat template; expected ",
    ),
    (
        "qnpu.generate(model, 'A', tokenizer=tokenizer, backend='gpu')",
        "backend: expected one of ['",
    ),
]


@pytest.fixture(scope="module")
def said(made) -> dict[str, str]:
    """What users are told, by mistake."""
    asked = json.dumps([mistake for mistake, _ in MISTAKES])
    run = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(run, input=asked, cwd=made, text=True, capture_output=True, check=True)
    assert sorted(p.name for p in made.glob("*.tflite")) == []
    return dict(zip([m for m, _ in MISTAKES], json.loads(found.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "expected"), MISTAKES, ids=[m for m, _ in MISTAKES])
def test_a_mistake_is_one_line(said, mistake, expected):
    assert said[mistake].startswith(expected)
    assert "\n" not in said[mistake].removeprefix(expected)
    assert not re.match(r"\w*(Error|Exception)\(|not refused", said[mistake])
